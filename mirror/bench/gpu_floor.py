"""A target's verification step on a GPU over its floor: the time in which its weights can be read at all.

    python -m mirror.bench.gpu_floor BUNDLE --out docs/results/gpu-floor-14b.json

The step is prefix, exit head and suffix at the width of a window: launched one after the other until the GPU
is done, each alone, and with candidates and logits brought to the host, as the engine runs it. The floor is the
weights' bytes over the bandwidth that torch reaches in products of the same matrices with as many rows.
"""

from __future__ import annotations

import functools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx

from mirror.bench.gpu_shared import SharedDevice
from mirror.bench.provenance import gpu_name, provenance
from mirror.bundle import Form, Manifest, product_kind, read_manifest
from mirror.runtime.feeds import FeedPool
from mirror.targets import open_device
from mirror.targets.base import Device, KVCache, LoadedSegment, LoadRequest, PassShape, Tensor, to_host

SEGMENTS = ("target_prefix", "exit_head", "target_suffix")
_WARM, _REPEATS = 8, 40
_ROUNDS = 3  # turns over all matrices of a bandwidth measurement
_HELD_BYTES = 2**29  # equal matrices multiplied in turn, so that none is still in the GPU's cache


@dataclass(frozen=True)
class StepTimes:
    """Times of one step in ms, medians.

    Attributes:
        context: tokens before the window.
        max_length: tokens that the cache has room for; kernels may look at all its slots.
        device_ms: the three segments launched one after the other, until the GPU is done.
        engine_ms: the same with candidates and logits read on the host.
    """

    context: int
    max_length: int
    prefix_ms: float
    exit_head_ms: float
    suffix_ms: float
    device_ms: float
    engine_ms: float


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--device", "index", default=0, show_default=True, help="The GPU's number.")
@click.option("--contexts", default="100,500,1500", show_default=True, help="Context lengths, comma-separated.")
@click.option("--max-length", "max_lengths", multiple=True, type=int, help="The cache's; the bundle's, if not given.")
@click.option("--out", type=click.Path(path_type=Path), default=None)
def main(bundle: Path, index: int, contexts: str, max_lengths: Sequence[int], out: Path | None) -> None:
    """Time the target of BUNDLE on one GPU."""
    manifest = read_manifest(bundle)
    if manifest.model.precision not in ("fp16", "bf16"):
        raise click.ClickException(
            f"{bundle} is in {manifest.model.precision}; the floor is that of 16-bit matrices, export it with "
            "--precision fp16"
        )
    device = SharedDevice(open_device(f"cuda:{index}"))
    steps = [load_step(bundle, manifest, device, length) for length in max_lengths or [manifest.decoding.max_length]]
    result = measure(bundle, manifest, steps, [int(context) for context in contexts.split(",")], index)
    for item in result["steps"]:
        click.echo(f"{item['device_over_floor']:.3f} of a floor of {result['floor_ms']:.2f} ms: {item}")
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def measure(
    bundle: Path, manifest: Manifest, steps: Sequence[Step], contexts: Sequence[int], index: int
) -> dict[str, Any]:
    """Return the times of steps after the contexts that fit, their floor, and where they come from."""
    times = [step.times(context) for step in steps for context in contexts if context <= step.max_length]
    width = manifest.decoding.gamma + 1
    matrices = [shape for name in SEGMENTS for shape in matrix_shapes(bundle, manifest, name)]
    size = sum(2 * rows * columns for rows, columns in matrices)
    bandwidth = gemm_bytes_per_s(matrices, width)
    floor_ms = 1e3 * size / bandwidth
    return {
        **provenance("mirror.bench.gpu_floor"),
        "gpu": gpu_name(index),
        "bundle": {"name": bundle.name, "precision": manifest.model.precision, "layers": manifest.model.layers},
        "width": width,
        "weight_bytes": size,
        "gemm_bytes_per_s": bandwidth,
        "floor_ms": floor_ms,
        "steps": [{**vars(item), "device_over_floor": item.device_ms / floor_ms} for item in times],
    }


class Step:
    """The target's segments on one GPU, at the width of a window."""

    def __init__(
        self,
        loaded: Mapping[str, tuple[LoadedSegment, KVCache | None]],
        pool: FeedPool,
        width: int,
        max_length: int,
    ) -> None:
        """Take the segments by name, each with its cache if it has one."""
        self.width, self.max_length = width, max_length
        self._loaded = loaded
        self._pool = pool

    def times(self, context: int) -> StepTimes:
        """Return the times of a step after a context of some tokens."""
        feeds = self._pool.at(self.width)
        feeds.fill_causal(np.arange(1, self.width + 1), context)
        given: dict[str, Tensor] = {**feeds.tensors, "logit_rows": np.arange(self.width)}

        def run(name: str) -> Mapping[str, Tensor]:
            segment, cache = self._loaded[name]
            return segment.run(given, cache, context)

        def launch() -> None:
            for name in SEGMENTS:
                run(name)

        def as_engine() -> None:
            run("target_prefix")
            candidates, chosen = run("exit_head")["candidate_ids"], run("target_suffix")["token_ids"]
            to_host(candidates)
            to_host(chosen)

        def wait() -> None:
            to_host(given["hidden_states"])  # small, and copied after all that was launched before

        given["hidden_states"] = run("target_prefix")["hidden_states"]
        prefix, head, suffix = (_median_ms(functools.partial(run, name), wait) for name in SEGMENTS)
        return StepTimes(
            context, self.max_length, prefix, head, suffix, _median_ms(launch, wait), _median_ms(as_engine, wait)
        )


def load_step(bundle: Path, manifest: Manifest, device: Device, max_length: int) -> Step:
    """Load the target of a bundle on a device, with a cache for so many tokens."""
    width = manifest.decoding.gamma + 1
    capacity = max_length + width
    loaded: dict[str, tuple[LoadedSegment, KVCache | None]] = {}
    for name in SEGMENTS:
        segment = manifest.segments[name]
        part = device.load_segment(LoadRequest(bundle, segment, [PassShape(width)], capacity, 1))
        loaded[name] = part, device.make_cache(segment.kv, capacity) if segment.kv else None
    return Step(loaded, FeedPool(capacity, manifest.model.max_positions), width, max_length)


def _median_ms(run: Callable[[], object], wait: Callable[[], None]) -> float:
    times = []
    for turn in range(_WARM + _REPEATS):
        start_s = time.perf_counter()
        run()
        wait()
        if turn >= _WARM:
            times.append(1e3 * (time.perf_counter() - start_s))
    return statistics.median(times)


def matrix_shapes(bundle: Path, manifest: Manifest, segment: str) -> Iterator[tuple[int, int]]:
    """Yield `(out, in)` of every matrix that a segment multiplies with."""
    model = onnx.load(bundle / manifest.segments[segment].graphs[Form.INPLACE].file, load_external_data=False)
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer if len(tensor.dims) == 2}
    for node in model.graph.node:
        if product_kind(node.op_type) == "FusedMatMul" and node.input[1] in shapes:
            rows, columns = shapes[node.input[1]]
            yield rows, columns


def gemm_bytes_per_s(matrices: list[tuple[int, int]], rows: int) -> float:
    """Return at what rate torch reads float16 matrices `(out, in)` in products with some rows."""
    seconds = {shape: _product_s(shape, rows) for shape in set(matrices)}
    return sum(2 * out * columns for out, columns in matrices) / sum(seconds[shape] for shape in matrices)


def _product_s(shape: tuple[int, int], rows: int) -> float:
    """Return how long one product with a matrix `(out, in)` takes that the GPU's cache doesn't hold."""
    import torch

    copies = max(2, _HELD_BYTES // (2 * shape[0] * shape[1]))
    weights = [torch.randn(shape, device="cuda", dtype=torch.float16) for _ in range(copies)]
    x = torch.randn(rows, shape[1], device="cuda", dtype=torch.float16)

    def run() -> None:
        for weight in weights:
            torch.nn.functional.linear(x, weight)

    return _seconds(run) / copies


def _seconds(run: Callable[[], object]) -> float:
    """Return how long recorded products take, replayed: the median."""
    import torch

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_ROUNDS):
            run()
    times = []
    for _ in range(_REPEATS):
        start_s = time.perf_counter()
        graph.replay()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start_s)
    return statistics.median(times) / _ROUNDS


if __name__ == "__main__":
    main()
