"""Products with int4, int8 and float16 weights on GPUs by mirror's own kernels."""

from __future__ import annotations

import re

import numpy as np
import pytest
from numpy.typing import NDArray

from mirror.bench.gpu_products import half_model, open_session, product_model, random_weights
from mirror.targets import cuda
from tests.nvrtc import compile_log

# Outputs that no thread block divides, inputs that no step does; large matrices, of inputs that no step divides, in one
# part and in some, which may differ in length.
SIZES = [(40, 64), (1000, 576), (576, 1536), (16392, 576), (2048, 5120), (1000, 17408)]
SMALL, UNEVEN = SIZES[:3], SIZES[3]
ROWS = (1, 2, 8, 11, 16, 17, 50, 100, 200)


def rows_of_ours(sizes: tuple[int, int], bits: int) -> range:
    """Return the numbers of rows that our kernels multiply; ONNX Runtime takes the others."""
    if sizes in SMALL:
        return range(1, 17 if bits == 16 else 65)
    return range(0) if bits == 16 else range(2 if sizes == UNEVEN else 1, 33)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_120", "compute_80"])
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("gated", [False, True])
def test_the_kernel_compiles_for_every_kind_of_gpu(architecture: str, bits: int, gated: bool) -> None:
    """NVRTC needs no GPU."""
    large = {"TILES": 2, "ACROSS": 2, "ALONG": 8, "STAGED": 1, "PARTS": 3}
    small = {"TILES": 1, "ACROSS": 2 if gated else 1, "STAGED": 0, "PARTS": 1}
    cuts = [({**small, "ALONG": 5}, 1000, 18), ({**small, "ALONG": 8 if gated else 16}, 960, 80)]
    if bits < 16:
        cuts += [(large, 1000, 18), (large, 5120, 544)]
    for cut, outputs, blocks in cuts:
        for row_tiles in (1, 2, 4):
            matrix = {"BITS": bits, "OUTPUTS": outputs, "BLOCKS": blocks, "GATED": int(gated)}
            both_fit = 2 if not cut["STAGED"] and row_tiles == 1 else 1
            facts = {**matrix, **cut, "ROW_TILES": row_tiles, "AHEAD": 1, "MIN_BLOCKS": both_fit}
            log = compile_log(("gated.cu", "products.cu"), architecture, facts)
            # Of groups of rows a few numbers of 128 may be read from memory, where a GPU has no more registers.
            assert spilled(log) <= (16 if row_tiles == 4 else 0)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_120", "compute_80"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("gated", [False, True])
def test_the_kernel_of_large_matrices_compiles_for_every_kind_of_gpu(architecture: str, bits: int, gated: bool) -> None:
    for outputs, blocks, parts, row_tiles, ahead in (
        (34816, 160, 1, 1, 4),
        (34816, 160, 1, 2, 3),
        (1000, 544, 5, 2, 3),
    ):
        matrix = {"BITS": bits, "OUTPUTS": outputs, "BLOCKS": blocks, "GATED": int(gated)}
        facts = {**matrix, "ROW_TILES": row_tiles, "WARPS": 8, "AHEAD": ahead, "PARTS": parts}
        assert spilled(compile_log(("gated.cu", "streamed.cu"), architecture, facts)) == 0


def spilled(log: str) -> int:
    """Return how many bytes a compiled kernel writes to memory for want of registers, at most."""
    return max(map(int, re.findall(r"(\d+) bytes spill stores", log)), default=0)


def random_matrix(sizes: tuple[int, int], bits: int, *, gated: bool = False) -> tuple[bytes, NDArray[np.float32]]:
    """Return a graph that multiplies with a matrix twice, and the matrix, `[outputs, inputs]`."""
    if bits == 16:
        matrix = (0.02 * np.random.default_rng(3).standard_normal(sizes, np.float32)).astype(np.float16)
        return half_model([matrix] * 2, gated=gated), matrix.astype(np.float32)
    blocks, scales = random_weights(*sizes, bits, seed=3)
    return product_model([(blocks, scales)] * 2, bits, gated=gated), dequantised(blocks, scales, bits)


def dequantised(blocks: NDArray[np.uint8], scales: NDArray[np.float16], bits: int) -> NDArray[np.float32]:
    """Return a matrix, `[outputs, inputs]`, each number rounded to float16 as kernels do."""
    values = np.stack([blocks & 15, blocks >> 4], axis=-1) if bits == 4 else blocks
    numbers = values.reshape(*blocks.shape[:2], 32).astype(np.float16) - np.float16(1 << (bits - 1))
    return (numbers * scales[..., None]).astype(np.float32).reshape(blocks.shape[0], -1)


def gated_halves(product: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return `silu(gate) * up` of a product's halves, `[rows, inner]`."""
    gate, up = np.split(product, 2, axis=-1)
    result: NDArray[np.float32] = gate / (1 + np.exp(-gate)) * up
    return result


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("gated", [False, True])
def test_products_are_those_of_the_matrix_and_independent_of_a_rows_place(
    sizes: tuple[int, int], bits: int, gated: bool
) -> None:
    if reason := cuda.cuda_missing():
        pytest.skip(reason)
    model, matrix = random_matrix(sizes, bits, gated=gated)
    session, other = open_session(model, "own"), open_session(model, "onnxruntime")
    generator = np.random.default_rng(4)
    for rows in ROWS:
        x = (0.1 * generator.standard_normal((1, rows, sizes[1]), np.float32)).astype(np.float16)
        expected = x[0].astype(np.float32) @ matrix.T
        expected = gated_halves(expected) if gated else expected
        first, second = session.run(None, {"x": x})
        theirs = other.run(["y0"], {"x": x})[0]
        for given, tolerance in ((first, 5e-3 if gated else 2e-3), (theirs, 5e-3)):
            assert given.shape == (1, rows, expected.shape[1])
            np.testing.assert_allclose(given[0], expected, rtol=0, atol=tolerance * np.abs(expected).max())
        np.testing.assert_array_equal(first, second)
        if rows not in rows_of_ours(sizes, bits):
            if not gated:
                np.testing.assert_array_equal(first, theirs)
            continue
        for row in (0, rows - 1):
            twice = session.run(["y0"], {"x": x[:, [row, row]]})[0]
            np.testing.assert_array_equal(twice[0], first[0, [row, row]])
