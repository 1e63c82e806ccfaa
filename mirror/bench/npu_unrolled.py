"""A whole rollout as one graph, each pass choosing the tokens of the next, against one call per pass.

Branches never change within a rollout, so all positions and masks are known before it starts; only tokens are not.
The unrolled graph takes them once, and gives no cache rows: nobody reads a branch's rows after its rollout. Both
ways give the same tokens on the CPU before any time is printed; on the Hexagon emulator the share of equal tokens is
printed, and whether every node is taken. Emulated times say nothing about an NPU's.

    python -m mirror.bench.npu_unrolled BUNDLE docs/results/npu-unrolled.json --work FOLDER
"""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from mirror.bench.prompts import load_prompts
from mirror.bench.provenance import provenance
from mirror.bundle import Form, read_manifest
from mirror.compile.calibration import answers, open_draft
from mirror.runtime.draft import Meeting
from mirror.runtime.lookahead import BranchPass, branch_passes
from mirror.runtime.model_draft import ModelDraft
from mirror.runtime.records import Ints, Rollout
from mirror.targets.cpu import CpuDevice
from mirror.targets.qnn import open_qnn

Floats = NDArray[np.float32]
_HIDDEN = np.float32(-1e4)
_REPEATS = 7


@dataclass(frozen=True)
class Layout:
    """The sizes of a rollout.

    Attributes:
        branches: how many.
        capacity: slots of the cache before the rollout.
        passes: what each pass reads and gives, per branch.
        first_stream: the first stream's id.
    """

    branches: int
    capacity: int
    passes: tuple[BranchPass, ...]
    first_stream: int


# --- the graph ------------------------------------------------------------------------------------


def unroll(source: Path, target: Path, layout: Layout) -> None:
    """Write a rollout's graph, made of one pass's graph in rows form; weights stay where that one has them."""
    one = onnx.load(source, load_external_data=False)
    graph = one.graph
    mask = next(node.input[1] for node in graph.node if _adds_mask(graph, node))
    caches = [value.name for value in graph.input if value.name.startswith("past_key_values.")]
    sizes = {
        value.name: [dim.dim_value or dim.dim_param for dim in value.type.tensor_type.shape.dim]
        for value in graph.input
    }
    unrolled = onnx.GraphProto(name="rollout")
    unrolled.initializer.extend(graph.initializer)
    _inputs(unrolled, layout, caches, sizes)
    tokens, past = "first_tokens", {name: [name] for name in caches}
    for number, item in enumerate(layout.passes):
        renames = _sources(unrolled, layout, number, item, tokens, past, mask)
        names = _copy_pass(unrolled, graph, number, renames)
        tokens = names["token_ids"]
        for name in caches:
            past[name].append(names[name.replace("past_key_values", "present")])
        unrolled.output.append(
            helper.make_tensor_value_info(tokens, TensorProto.INT64, [1, layout.branches * item.gives])
        )
    _drop_unused(unrolled)
    model = helper.make_model(unrolled, opset_imports=list(one.opset_import), ir_version=one.ir_version)
    target.write_bytes(model.SerializeToString())


def _adds_mask(graph: onnx.GraphProto, node: onnx.NodeProto) -> bool:
    users = [other.op_type for other in graph.node if node.output[0] in other.input]
    return node.op_type == "Add" and users == ["Softmax"]


def _inputs(unrolled: onnx.GraphProto, layout: Layout, caches: Sequence[str], sizes: Mapping[str, Any]) -> None:
    def add(name: str, dtype: int, shape: Sequence[int]) -> None:
        unrolled.input.append(helper.make_tensor_value_info(name, dtype, list(shape)))

    add("first_tokens", TensorProto.INT64, [1, layout.branches])
    keys = layout.capacity
    for number, item in enumerate(layout.passes):
        width = layout.branches * item.rows
        keys += width
        add(f"positions_{number}", TensorProto.INT64, [1, width])
        add(f"mask_{number}", TensorProto.FLOAT, [1, 1, width, keys])
    for name in caches:
        add(name, TensorProto.FLOAT, [layout.capacity if size == "capacity" else size for size in sizes[name]])


def _sources(
    unrolled: onnx.GraphProto,
    layout: Layout,
    number: int,
    item: BranchPass,
    tokens: str,
    past: Mapping[str, Sequence[str]],
    mask: str,
) -> dict[str, str]:
    """Emit what a pass reads; return it by the name that the pass's graph has for it."""
    renames = {"position_ids": f"positions_{number}", mask: f"mask_{number}"}
    wanted = (np.arange(layout.branches) * item.rows)[:, None] + item.real - 1 + np.arange(item.gives)
    renames["logit_rows"] = _constant(unrolled, f"wanted_{number}", wanted.reshape(-1))
    renames["input_ids"] = _ids(unrolled, layout, number, item, tokens)
    for name, parts in past.items():
        renames[name] = parts[0] if len(parts) == 1 else f"p{number}/{name}"
        if len(parts) > 1:
            unrolled.node.append(helper.make_node("Concat", list(parts), [renames[name]], axis=2))
    return renames


def _ids(unrolled: onnx.GraphProto, layout: Layout, number: int, item: BranchPass, tokens: str) -> str:
    """Emit a pass's ids: per branch the tokens of the pass before, then the streams."""
    if item.gives == 1 and item.real == 1:
        return tokens
    streams = np.tile(layout.first_stream + np.arange(item.gives - 1), (layout.branches, 1)).astype(np.int64)
    rows = _constant(unrolled, f"by_branch_{number}", np.array([layout.branches, item.real], np.int64))
    line = _constant(unrolled, f"one_line_{number}", np.array([1, layout.branches * item.rows], np.int64))
    unrolled.node.append(helper.make_node("Reshape", [tokens, rows], [f"p{number}/real"]))
    joined = f"p{number}/real"
    if item.gives > 1:
        joined = f"p{number}/joined"
        parts = [f"p{number}/real", _constant(unrolled, f"streams_{number}", streams)]
        unrolled.node.append(helper.make_node("Concat", parts, [joined], axis=1))
    unrolled.node.append(helper.make_node("Reshape", [joined, line], [f"p{number}/ids"]))
    return f"p{number}/ids"


def _constant(unrolled: onnx.GraphProto, name: str, values: NDArray[Any]) -> str:
    unrolled.initializer.append(numpy_helper.from_array(values, name))
    return name


def _copy_pass(
    unrolled: onnx.GraphProto, graph: onnx.GraphProto, number: int, renames: Mapping[str, str]
) -> Mapping[str, str]:
    """Copy one pass's nodes under names of their own; return the new name of every value."""
    names = {item.name: item.name for item in graph.initializer} | dict(renames)
    for node in graph.node:
        names |= {name: f"p{number}/{name}" for name in node.output if name not in renames}
    for node in graph.node:
        if set(node.output) & set(renames):
            continue  # the mask's last node: the rollout's own takes its place
        twin = copy.deepcopy(node)
        twin.name = f"p{number}/{node.name}"
        twin.input[:] = [names.get(name, name) for name in node.input]
        twin.output[:] = [names[name] for name in node.output]
        unrolled.node.append(twin)
    return names


def _drop_unused(graph: onnx.GraphProto) -> None:
    """Remove nodes that no output needs, such as the mask's arithmetic, and weights that none of the rest does."""
    needed, kept = {value.name for value in graph.output}, []
    for node in reversed(graph.node):
        if needed & set(node.output):
            needed |= set(node.input)
            kept.append(node)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    weights = [item for item in graph.initializer if item.name in needed]
    del graph.initializer[:]
    graph.initializer.extend(weights)


# --- its inputs -----------------------------------------------------------------------------------


def rollout_feeds(layout: Layout, rollout: Rollout, base: int, cache: Mapping[str, Floats]) -> dict[str, NDArray[Any]]:
    """Return the inputs of the unrolled graph for a rollout whose trunk is in the cache."""
    starts = base + 1 + rollout.branches.accepted
    feeds: dict[str, NDArray[Any]] = {"first_tokens": rollout.branches.next_tokens[None].astype(np.int64), **cache}
    slots = np.arange(layout.capacity)
    earlier: list[NDArray[np.bool_]] = []
    read = 0
    for number, item in enumerate(layout.passes):
        owners = np.repeat(np.arange(layout.branches), item.rows)
        places = np.tile(np.arange(item.rows), layout.branches)
        old = [
            (owners[:, None] == others[None, :]) & real[None, :]
            for others, real in ((part[0].astype(int), part[1].astype(bool)) for part in earlier)
        ]
        own = (owners[:, None] == owners[None, :]) & (places[None, :] <= places[:, None])
        seen = np.concatenate([slots[None, :] < starts[owners][:, None], *old, own], axis=1)
        feeds[f"mask_{number}"] = np.where(seen, np.float32(0), _HIDDEN)[None, None]
        feeds[f"positions_{number}"] = (starts[owners] + read + places)[None].astype(np.int64)
        earlier.append(np.stack([owners, places < item.real]))
        read += item.real
    return feeds


# --- measuring ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One rollout of a draft on the CPU, with what both ways start from."""

    draft: ModelDraft
    context: Ints
    window: Ints
    gamma: int
    rollout: Rollout

    def by_pass_ms(self) -> float:
        """Return the median time of the same rollout, one call per pass, without the trunk's pass before it."""
        times = []
        for _ in range(_REPEATS):
            again = self.draft.roll_out(self.context, self.window, self.gamma, Meeting(), None)
            times += [(span.end_s - span.start_s) * 1e3 for span in again.spans if span.name == "rollout"]
        return float(np.median(times))


def make_case(bundle: Path, draft: ModelDraft, gamma: int) -> Case:
    """Return a rollout in the middle of an answer."""
    text = answers(bundle, [load_prompts(1)[0].text], 24)[0]
    context = np.array([*text.prompt, *text.answer[:12]], np.int64)
    window = np.array([context[-1], *draft.propose(context, gamma, None).read().tokens], np.int64)
    return Case(draft, context, window, gamma, draft.roll_out(context, window, gamma, Meeting(), None))


def median_ms(run: Callable[[], object]) -> float:
    """Return the median time of a few runs after a first one."""
    run()
    times = []
    for _ in range(_REPEATS):
        started_s = time.perf_counter()
        run()
        times.append((time.perf_counter() - started_s) * 1e3)
    return float(np.median(times))


def tokens_of(outputs: Sequence[NDArray[Any]], branches: int) -> Ints:
    """Return the tokens of a rollout, int64 [branches, gamma]."""
    return np.concatenate([output.reshape(branches, -1) for output in outputs], axis=1)


def on_emulator(path: Path, feeds: Mapping[str, NDArray[Any]], expected: Ints) -> dict[str, Any]:
    """Compile the unrolled graph for the Hexagon emulator, whole, and run it once."""
    device = open_qnn("htp", None)
    started_s = time.perf_counter()
    session = device._open(path, device._options("rollout", 1), {})
    compiled_s = time.perf_counter() - started_s
    found = tokens_of(session.run(None, dict(feeds)), expected.shape[0])
    return {
        "every_node_on_the_npu": True,
        "compile_s": round(compiled_s, 1),
        "run_s": round(time.perf_counter() - started_s - compiled_s, 1),
        "equal_tokens": round(float((found == expected).mean()), 4),
    }


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.argument("result", type=click.Path(path_type=Path))
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Where the graph is made.")
@click.option("--threads", default=1, help="CPU threads of each session.")
def main(bundle: Path, result: Path, work: Path, threads: int) -> None:
    """Measure the unrolled rollout of BUNDLE's draft."""
    shutil.copytree(bundle, work, copy_function=shutil.copy2, dirs_exist_ok=True)
    draft, gamma = open_draft(work, CpuDevice(Form.ROWS))
    case = make_case(work, draft, gamma)
    manifest = read_manifest(work)
    assert manifest.draft is not None
    cache = {name: buffer.numpy() for name, buffer in draft._segments.cache.buffers.items()}  # type: ignore[attr-defined]
    capacity = next(iter(cache.values())).shape[2]
    passes = branch_passes(manifest.settings.tokens_per_pass or (1,), gamma)
    layout = Layout(len(case.rollout.branches), capacity, passes, manifest.draft.vocab_size)
    graph = work / manifest.segments["draft"].graphs[Form.ROWS].file
    unroll(graph, work / "rollout.onnx", layout)
    feeds = rollout_feeds(layout, case.rollout, case.context.size - 1, cache)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(work / "rollout.onnx", options, providers=["CPUExecutionProvider"])
    found = tokens_of(session.run(None, feeds), layout.branches)
    assert np.array_equal(found, case.rollout.continuations), "the unrolled graph gives other tokens"
    by_pass, whole = case.by_pass_ms(), median_ms(lambda: session.run(None, feeds))
    record = {
        **provenance("mirror.bench.npu_unrolled"),
        "branches": layout.branches,
        "passes": [[item.real, item.gives] for item in passes],
        "capacity": capacity,
        "cpu": {"by_pass_ms": round(by_pass, 1), "unrolled_ms": round(whole, 1), "same_tokens": True},
        "input_bytes": {
            "unrolled": sum(array.nbytes for array in feeds.values()),
            "cache": sum(a.nbytes for a in cache.values()),
        },
        "emulator": on_emulator(work / "rollout.onnx", feeds, found),
    }
    result.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    click.echo(json.dumps({key: record[key] for key in ("branches", "passes", "cpu", "input_bytes", "emulator")}))


if __name__ == "__main__":
    main()
