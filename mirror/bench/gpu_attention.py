"""Attention of a few rows over a cache in place, on a GPU: `python -m mirror.bench.gpu_attention --out FILE`.

Sessions of ONNX Runtime with some layers of one size each, replayed as CUDA graphs: mirror's own kernel beside ONNX
Runtime's, after several contexts, for a target's window and for a draft's branches, which have a mask.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper

from mirror.bench.provenance import gpu_name, provenance
from mirror.targets.cuda import PROVIDER
from mirror.targets.kernel_library import LIBRARY, operators_missing

ARMS: Mapping[str, Path | None] = {"own": LIBRARY, "onnxruntime": None}
_ORT = "com.microsoft"
_HALF = TensorProto.FLOAT16
_MASKED = np.float16(-np.inf)


@dataclass(frozen=True)
class Heads:
    """Sizes of an attention layer: query heads, key heads, channels of each, slots of the cache."""

    queries: int
    keys: int
    head: int
    capacity: int

    @property
    def width(self) -> int:
        """Channels of a row's queries, keys and values side by side."""
        return (self.queries + 2 * self.keys) * self.head


def attention_model(heads: Heads, layers: int, *, masked: bool, apart: bool = False) -> bytes:
    """Return a graph of layers that all read x, float16 `[1, rows, width]`: y0, y1, ..

    Args:
        masked: whether it takes `positions` and a `bias` for each row and slot, as a draft's.
        apart: whether x is the queries alone, and keys and values come as `xk` and `xv`.
    """
    tables = [helper.make_tensor(name, _HALF, table.shape, table.tobytes(), raw=True) for name, table in _tables(heads)]
    cache: list[int | str] = [1, heads.keys, heads.capacity, heads.head]
    rows = [("x", heads.queries), ("xk", heads.keys), ("xv", heads.keys)]
    widths = [(name, count * heads.head) for name, count in rows] if apart else [("x", heads.width)]
    inputs = [helper.make_tensor_value_info(name, _HALF, [1, "rows", width]) for name, width in widths]
    inputs += [
        helper.make_tensor_value_info(name, TensorProto.INT32, shape)
        for name, shape in (("filled", [1]), ("total", []))
    ]
    more = []
    if masked:
        more = ["positions", "bias"]
        inputs += [
            helper.make_tensor_value_info("positions", TensorProto.INT64, [1, "rows"]),
            helper.make_tensor_value_info("bias", _HALF, [1, 1, "rows", "slots"]),
        ]
    nodes, outputs = [], []
    facts: dict[str, Any] = {
        "num_heads": heads.queries,
        "kv_num_heads": heads.keys,
        "do_rotary": 1,
        "local_window_size": -1,
    }
    for layer in range(layers):
        given = [f"k{layer}", f"v{layer}"]
        names = [*(["x", "xk", "xv"] if apart else ["x", "", ""]), *given, "filled", "total", "cosines", "sines", *more]
        made = [f"y{layer}", f"new_k{layer}", f"new_v{layer}"]
        nodes.append(helper.make_node("GroupQueryAttention", names, made, domain=_ORT, **facts))
        inputs += [helper.make_tensor_value_info(name, _HALF, cache) for name in given]
        shapes: list[list[int | str]] = [[1, "rows", heads.queries * heads.head], cache, cache]
        outputs += [helper.make_tensor_value_info(name, _HALF, shape) for name, shape in zip(made, shapes, strict=True)]
    graph = helper.make_graph(nodes, "attention", inputs, outputs, tables)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(_ORT, 1)]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())


def _tables(heads: Heads) -> Sequence[tuple[str, NDArray[np.float16]]]:
    speeds = 10000.0 ** -(np.arange(heads.head // 2) / (heads.head // 2))
    angles = np.arange(heads.capacity)[:, None] * speeds
    return ("cosines", np.cos(angles).astype(np.float16)), ("sines", np.sin(angles).astype(np.float16))


def random_inputs(
    heads: Heads, rows: int, past: int, *, masked: bool, apart: bool = False, seed: int = 0
) -> Mapping[str, NDArray[Any]]:
    """Return what a pass reads besides its caches, of which `past` slots are filled; a mask hides a third of them."""
    numbers = np.random.default_rng(seed)
    inputs: dict[str, NDArray[Any]] = {
        "x": numbers.standard_normal((1, rows, heads.width), np.float32).astype(np.float16),
        "filled": np.array([past + rows - 1], np.int32),
        "total": np.array(heads.capacity, np.int32),
    }
    if apart:
        ends = [heads.queries * heads.head, (heads.queries + heads.keys) * heads.head]
        inputs |= dict(zip(("x", "xk", "xv"), np.split(inputs["x"], ends, axis=2), strict=True))
    if masked:
        hidden = numbers.random((rows, heads.capacity)) < 1 / 3
        hidden[np.arange(rows), past + np.arange(rows)] = False
        inputs["positions"] = past // 2 + np.arange(rows)[None] // 2
        inputs["bias"] = np.where(hidden, _MASKED, np.float16(0))[None, None]
    return inputs


class Attention:
    """A session with its caches, in which filled slots hold random numbers."""

    def __init__(
        self,
        heads: Heads,
        layers: int,
        library: Path | None,
        *,
        masked: bool,
        apart: bool = False,
        recorded: bool = False,
        device: str = "cuda",
    ) -> None:
        """Make the session.

        Args:
            library: whose operators it takes before ONNX Runtime's.
            recorded: whether its runs are replayed as a CUDA graph.
            device: `cuda`, the first GPU, or `cpu`.
        """
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if library is not None:
            options.register_custom_ops_library(str(library))
        settings = {"enable_cuda_graph": "1"} if recorded else {}
        provider = (PROVIDER, settings) if device == "cuda" else "CPUExecutionProvider"
        model = attention_model(heads, layers, masked=masked, apart=apart)
        self.session = ort.InferenceSession(model, options, providers=[provider])
        self._heads, self._layers = heads, layers
        self._place = ("cuda", 0) if device == "cuda" else ("cpu", 0)
        self._arrays: list[NDArray[Any]] = []  # which tensors on the host lie in

    def bind(self, inputs: Mapping[str, NDArray[Any]], past: int) -> tuple[ort.IOBinding, Mapping[str, ort.OrtValue]]:
        """Return a binding with new caches, and all of its tensors."""
        heads, binding, numbers = self._heads, self.session.io_binding(), np.random.default_rng(0)
        values = {name: self._tensor(array, on_host=name == "total") for name, array in inputs.items()}
        for layer in range(self._layers):
            for name in (f"k{layer}", f"v{layer}"):
                cache = np.zeros((1, heads.keys, heads.capacity, heads.head), np.float16)
                cache[:, :, :past] = numbers.standard_normal((1, heads.keys, past, heads.head), np.float32)
                values[name] = self._tensor(cache)
                binding.bind_ortvalue_output(f"new_{name}", values[name])
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        shape = (1, inputs["x"].shape[1], heads.queries * heads.head)
        for name in (f"y{layer}" for layer in range(self._layers)):
            values[name] = self._tensor(np.zeros(shape, np.float16))
            binding.bind_ortvalue_output(name, values[name])
        return binding, values

    def _tensor(self, array: NDArray[Any], *, on_host: bool = False) -> ort.OrtValue:
        self._arrays.append(np.ascontiguousarray(array))
        return ort.OrtValue.ortvalue_from_numpy(self._arrays[-1], *(("cpu", 0) if on_host else self._place))

    def time_us(self, rows: int, past: int, *, masked: bool, replays: int = 50) -> float:
        """Return the microseconds of one layer, the fastest of five runs of replays."""
        binding, _ = self.bind(random_inputs(self._heads, rows, past, masked=masked), past)
        for _ in range(3):
            self.session.run_with_iobinding(binding)
        best = float("inf")
        for _ in range(5):
            start_s = time.perf_counter()
            for _ in range(replays):
                self.session.run_with_iobinding(binding)
            best = min(best, time.perf_counter() - start_s)
        return 1e6 * best / replays / self._layers


# Query heads, key heads and channels of a 14B model's target and of the shipped draft; rows; whether they are masked.
CASES = (
    ("target", Heads(40, 8, 128, 0), (1, 8, 16), False),
    ("draft", Heads(9, 3, 64, 0), (1, 8, 64, 256), True),
)


@click.command()
@click.option("--contexts", default="100,500,2000,8000", show_default=True)
@click.option("--layers", default=20, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=None)
def main(contexts: str, layers: int, out: Path | None) -> None:
    """Time attention on the first GPU."""
    if missing := operators_missing():
        raise click.ClickException(f"there are no kernels of mirror's own: {missing}")
    ort.preload_dlls()
    results = []
    for past in map(int, contexts.split(",")):
        for name, sizes, row_counts, masked in CASES:
            heads = Heads(sizes.queries, sizes.keys, sizes.head, -(-(past + 512) // 1024) * 1024)
            for rows in row_counts:
                us = {}
                for arm, library in ARMS.items():  # a recording is of one shape
                    session = Attention(heads, layers, library, masked=masked, recorded=True)
                    us[arm] = round(session.time_us(rows, past, masked=masked), 1)
                facts = {"of": name, "context": past, "capacity": heads.capacity, "rows": rows}
                results.append({**facts, "us": us})
                click.echo(json.dumps(results[-1]))
    if out is not None:
        facts = {**provenance("mirror.bench.gpu_attention"), "gpu": gpu_name(0), "layers": layers}
        out.write_text(json.dumps({**facts, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
