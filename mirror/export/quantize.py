"""Quantisation of linear layers, in two ways.

Weight-only, by ONNX Runtime's own block quantiser: blocks of 32 along the input, symmetric, activations rounded to
8 bits inside the operator (`accuracy_level` 4), the layout that ONNX Runtime's fast CPU and CUDA kernels take. And, for
a draft on a CPU, whole rows in 8 bits, to be multiplied by activations that are rounded as one (`quantise_rows`).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mirror.export.weights import WeightFile

BLOCK = 32
ACCURACY_LEVEL = 4
ORT = "com.microsoft"
_ROWS_AT_ONCE = 256
# Routers pick experts by small differences; they stay in floating point.
_KEPT = (".gate.weight", ".router.weight", "router.classifier.weight")


def is_quantisable(name: str) -> bool:
    """Whether a linear layer's weight, named as in the checkpoint, is to be quantised."""
    return not name.endswith(_KEPT)


@dataclass(frozen=True)
class Quantised:
    """The two tensors of a quantised weight, in the bundle's file.

    `blocks` is uint8 `[out, in / 32, 32 * bits / 8]`, `scales` `[out, in / 32]` in the bundle's float type.
    """

    blocks: ir.ExternalTensor
    scales: ir.ExternalTensor
    bits: int
    rows: int
    columns: int


@dataclass
class Quantiser:
    """Quantises weights into a file; each key once."""

    bits: int
    file: WeightFile
    dtype: ir.DataType = ir.DataType.FLOAT

    def quantise(self, key: str, shape: tuple[int, int], make: Callable[[], NDArray[np.float32]]) -> Quantised:
        """Return a weight's quantised tensors.

        Args:
            shape: `(out, in)`.
            make: gives the weight, float32 `[out, in]`; called at most once per key.
        """
        rows, columns = shape
        block_count = -(-columns // BLOCK)
        done: list[tuple[NDArray[np.uint8], NDArray[np.float32]]] = []

        def result() -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
            if not done:
                done.append(_quantise(make(), self.bits))
            return done[0]

        key = f"{key}:int{self.bits}"
        blocks = self.file.store(
            f"{key}.blocks", ir.DataType.UINT8, [rows, block_count, BLOCK * self.bits // 8], lambda: result()[0]
        )
        scales = self.file.store(
            f"{key}.scales", self.dtype, [rows, block_count], lambda: result()[1].astype(self.dtype.numpy())
        )
        return Quantised(blocks, scales, self.bits, rows, columns)


def quantise_rows(
    file: WeightFile, key: str, shape: tuple[int, int], make: Callable[[], NDArray[np.float32]]
) -> tuple[ir.ExternalTensor, ir.ExternalTensor]:
    """Return a weight as `DynamicQuantizeMatMul` takes it: int8 `[in, out]`, and a float32 scale for each output.

    Args:
        shape: `(out, in)`.
        make: gives the weight, float32 `[out, in]`; called at most once per key.
    """
    rows, columns = shape
    done: list[tuple[NDArray[np.int8], NDArray[np.float32]]] = []

    def result() -> tuple[NDArray[np.int8], NDArray[np.float32]]:
        if not done:
            weight = make()
            scales = np.abs(weight).max(axis=1) / 127
            scales[scales == 0] = 1
            done.append((np.rint(weight / scales[:, None]).astype(np.int8).T, scales.astype(np.float32)))
        return done[0]

    values = file.store(f"{key}:rows8.values", ir.DataType.INT8, [columns, rows], lambda: result()[0])
    scales = file.store(f"{key}:rows8.scales", ir.DataType.FLOAT, [rows], lambda: result()[1])
    return values, scales


def _quantise(weight: NDArray[np.float32], bits: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    with _root_logger_kept():
        from onnxruntime.quantization.matmul_nbits_quantizer import (
            DefaultWeightOnlyQuantConfig,
            DefaultWeightOnlyQuantizer,
        )
    config = DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=True, accuracy_level=ACCURACY_LEVEL, bits=bits)

    def quantise(rows: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        blocks, scales, _ = DefaultWeightOnlyQuantizer(config).qbits_block_quant(np.ascontiguousarray(rows.T))
        return blocks, scales.reshape(rows.shape[0], -1)

    # Most of the time goes into turning matrices, which threads do side by side, and caches like in parts.
    with ThreadPoolExecutor() as pool:
        parts = list(pool.map(quantise, np.array_split(weight, -(-weight.shape[0] // _ROWS_AT_ONCE))))
    return np.concatenate([blocks for blocks, _ in parts]), np.concatenate([scales for _, scales in parts])


@contextlib.contextmanager
def _root_logger_kept() -> Iterator[None]:
    """Undo what the quantiser's import does: it turns the whole program's logging to INFO."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    try:
        yield
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers


def matmul_attributes(weight: Quantised) -> dict[str, int]:
    """Return the attributes of `MatMulNBits` for a weight."""
    return {
        "K": weight.columns,
        "N": weight.rows,
        "bits": weight.bits,
        "block_size": BLOCK,
        "accuracy_level": ACCURACY_LEVEL,
    }


def gather_attributes(weight: Quantised) -> dict[str, int]:
    """Return the attributes of `GatherBlockQuantized` for an embedding that shares a weight."""
    return {"bits": weight.bits, "block_size": BLOCK, "gather_axis": 0, "quantize_axis": 1}
