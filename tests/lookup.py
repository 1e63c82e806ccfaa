"""Bundles of lookup-table models: real graphs in real sessions, chosen laws, milliseconds.

Every model here is a tiny attention model whose logits depend on the *whole* visible context through
its KV caches, so that a wrong slot, a stale row, a wrong position or a leaking branch changes tokens:

    layer 0 stores v0(j) = id_j * (1 + position_j % 7)       s0(row) = sum of v0 over visible slots
    layer 1 stores v1(j) = (s0(j) + id_j) % 11 * (1 + j % 5)  s1(row) = sum of v1 over visible slots
    row of the table = (context * (s0 + 3 * s1) + id) % rows

With `context = 0` a row depends on its own token alone (a Markov chain), for chosen laws. `oracle_*`
compute the same in plain Python, with no cache, no window and no graph.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from mirror.bundle import (
    NOISE_POSITIONS,
    SCHEMA_VERSION,
    VOCABULARY_FILE,
    Decoding,
    DraftFacts,
    FileFacts,
    Form,
    Graph,
    LayerKV,
    Manifest,
    ModelFacts,
    Producer,
    Segment,
    TensorSpec,
    Tokens,
    file_sha256,
    kv_names,
    read_manifest,
    write_manifest,
)
from mirror.runtime.engine import Engine
from mirror.runtime.options import EngineOptions
from mirror.targets.base import Device
from mirror.targets.cpu import CpuDevice

Table = NDArray[np.float32]
HIDDEN = 4  # what the prefix hands over: id, s0 and two zeros

_TYPES = {"int64": TensorProto.INT64, "int32": TensorProto.INT32, "float32": TensorProto.FLOAT}
_INPUTS: dict[str, tuple[str, tuple[int | str, ...]]] = {
    "features": ("float32", (1, "width", HIDDEN)),
    "feature_rows": ("float32", ("width",)),
    "input_ids": ("int64", (1, "width")),
    "position_ids": ("int64", (1, "width")),
    "hidden_states": ("float32", (1, "width", HIDDEN)),
    "logit_rows": ("int64", ("rows",)),
    "seqlens_k": ("int32", (1,)),
    "total_sequence_length": ("int32", ()),
    "past_length": ("int32", (1,)),
    "row_visible": ("int32", ("width",)),
    "row_branch": ("int32", ("width",)),
    "slot_branch": ("int32", ("capacity",)),
    "noise_rows": ("int64", ("rows",)),
    "inverse_temperature": ("float32", (1,)),
}


@dataclass(frozen=True)
class Lookup:
    """One lookup model.

    Attributes:
        table: float32 [rows, vocab], logits.
        context: 0 for a Markov chain, 1 for a model that reads its whole context.
    """

    table: Table
    context: int = 1

    @property
    def vocab_size(self) -> int:
        return int(self.table.shape[1])


@dataclass(frozen=True)
class LookupBundle:
    """What to put into a bundle. `exit_table` guesses the next token from (s0, id) alone.

    `samples` gives it the draft's graph for drawn answers, whose scores get the target's noise.
    """

    target: Lookup
    draft: Lookup | None = None
    exit_table: Table | None = None
    eos: tuple[int, ...] = ()
    gamma: int = 3
    kappa: int = 2
    max_length: int = 64
    prefill_chunk: int = 5
    draft_kind: str = "model"
    streams: int = 0
    feature_layer: int | None = None
    samples: bool = False
    forms: tuple[Form, ...] = field(default=(Form.INPLACE, Form.ROWS))


class _GraphBuilder:
    """Collects nodes and names them by number."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.inputs: list[TensorSpec] = []
        self.outputs: list[TensorSpec] = []

    def take(self, name: str, dtype: str | None = None, shape: tuple[int | str, ...] | None = None) -> str:
        if all(spec.name != name for spec in self.inputs):
            known = _INPUTS.get(name)
            self.inputs.append(TensorSpec(name, dtype or known[0], shape if shape is not None else known[1]))  # type: ignore[index]
        return name

    def give(self, name: str, value: str, dtype: str, shape: tuple[int | str, ...]) -> None:
        self.nodes.append(helper.make_node("Identity", [value], [name]))
        self.outputs.append(TensorSpec(name, dtype, shape))

    def op(self, kind: str, *inputs: str, **attributes: object) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def top(self, value: str, count: int) -> tuple[str, str]:
        names = [f"v{len(self.nodes)}_values", f"v{len(self.nodes)}_ids"]
        self.nodes.append(helper.make_node("TopK", [value, self.ints([count])], names, axis=-1))
        return names[0], names[1]

    def constant(self, values: NDArray[np.generic]) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(values, name))
        return name

    def ints(self, values: Sequence[int] | int) -> str:
        return self.constant(np.array(values, np.int64))

    def to_ints(self, value: str) -> str:
        return self.op("Cast", value, to=TensorProto.INT64)

    def to_floats(self, value: str) -> str:
        return self.op("Cast", value, to=TensorProto.FLOAT)

    def save(self, path: Path) -> Graph:
        def infos(specs: list[TensorSpec]) -> list[onnx.ValueInfoProto]:
            return [helper.make_tensor_value_info(spec.name, _TYPES[spec.dtype], spec.shape) for spec in specs]

        graph = helper.make_graph(self.nodes, path.stem, infos(self.inputs), infos(self.outputs), self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
        onnx.checker.check_model(model)
        onnx.save(model, path)
        return Graph(path.name, tuple(self.inputs), tuple(self.outputs))


def _attend(g: _GraphBuilder, layer: int, values: str, first_slot: str, visible: str, form: Form) -> str:
    """Store one value per row, int64 [width], in a layer's cache; return the sum over visible slots.

    Args:
        first_slot: int64 [1], the slot of row 0.
        visible: bool [width, capacity].
    """
    key, value = kv_names("past_key_values", layer)
    shape = (1, 1, "capacity", 1)
    past = g.take(key, "float32", shape)
    other = g.take(value, "float32", shape)
    rows = g.op("Unsqueeze", g.to_floats(values), g.ints([0, 1, 3]))  # [1, 1, width, 1]
    width = g.op("Shape", values)
    slots = g.op("Add", g.op("Range", g.ints(0), g.op("Squeeze", width), g.ints(1)), first_slot)
    indices = g.op("Unsqueeze", slots, g.ints([0, 1, 3]))
    present = g.op("ScatterElements", past, indices, rows, axis=2)
    negated = g.op("ScatterElements", other, indices, g.op("Neg", rows), axis=2)
    # The key holds the value, the value its negation: both caches must agree for the sum to be right.
    both = g.op("Div", g.op("Sub", present, negated), g.constant(np.array(2, np.float32)))
    flat = g.op("Reshape", both, g.ints([1, -1]))  # [1, capacity]
    seen = g.op("Where", visible, flat, g.constant(np.zeros(1, np.float32)))
    total = g.to_ints(g.op("ReduceSum", seen, g.ints([1]), keepdims=0))  # [width]
    for name, full, new in zip(kv_names("present", layer), (present, negated), (rows, g.op("Neg", rows)), strict=True):
        if form is Form.INPLACE:
            g.give(name, full, "float32", shape)
        else:
            g.give(name, new, "float32", (1, 1, "width", 1))
    return total


def _slots(g: _GraphBuilder, layer: int) -> str:
    """Return int64 [1, capacity], the slot numbers, as long as a layer's cache."""
    past = g.take(kv_names("past_key_values", layer)[0], "float32", (1, 1, "capacity", 1))
    capacity = g.op("Squeeze", g.op("Shape", past, start=2, end=3))
    return g.op("Unsqueeze", g.op("Range", g.ints(0), capacity, g.ints(1)), g.ints([0]))


def _weighted(g: _GraphBuilder, values: str, numbers: str, period: int) -> str:
    weight = g.op("Add", g.op("Mod", numbers, g.ints(period)), g.ints(1))
    return g.op("Mul", values, weight)


def _layer_1_values(g: _GraphBuilder, ids: str, s0: str, positions: str) -> str:
    return _weighted(g, g.op("Mod", g.op("Add", s0, ids), g.ints(11)), positions, 5)


def _table_rows(g: _GraphBuilder, model: Lookup, ids: str, s0: str, s1: str) -> str:
    mixed = g.op("Add", s0, g.op("Mul", s1, g.ints(3)))
    index = g.op("Add", g.op("Mul", mixed, g.ints(model.context)), ids)
    return g.op("Gather", g.constant(model.table), g.op("Mod", index, g.ints(model.table.shape[0])))


def _flat(g: _GraphBuilder, name: str) -> str:
    return g.op("Reshape", g.take(name), g.ints([-1]))


def _prefix(path: Path, form: Form) -> Graph:
    g = _GraphBuilder()
    ids, positions = _flat(g, "input_ids"), _flat(g, "position_ids")
    first = g.to_ints(g.take("past_length"))
    own = g.op("Add", g.op("Range", g.ints(0), g.op("Squeeze", g.op("Shape", ids)), g.ints(1)), first)
    visible = g.op("LessOrEqual", _slots(g, 0), g.op("Unsqueeze", own, g.ints([1])))
    s0 = _attend(g, 0, _weighted(g, ids, positions, 7), first, visible, form)
    zero = g.op("Mul", s0, g.ints(0))
    parts = [g.op("Unsqueeze", g.to_floats(part), g.ints([0, 2])) for part in (ids, s0, zero, zero)]
    hidden = g.op("Concat", *parts, axis=2)
    g.give("hidden_states", hidden, "float32", (1, "width", HIDDEN))
    return g.save(path)


def _unpack(g: _GraphBuilder) -> tuple[str, str]:
    """Return (ids, s0), int64 [width], from the exit layer's state."""
    state = g.to_ints(g.op("Squeeze", g.take("hidden_states"), g.ints([0])))
    return g.op("Gather", state, g.ints(0), axis=1), g.op("Gather", state, g.ints(1), axis=1)


def _give_candidates(g: _GraphBuilder, logits: str, count: int, rows: str = "width") -> None:
    values, ids = g.top(g.op("LogSoftmax", logits, axis=-1), count)
    g.give("candidate_ids", g.op("Unsqueeze", ids, g.ints([0])), "int64", (1, rows, count))
    g.give("candidate_logprobs", g.op("Unsqueeze", values, g.ints([0])), "float32", (1, rows, count))


def _exit_head(path: Path, table: Table, context: int, count: int) -> Graph:
    g = _GraphBuilder()
    ids, s0 = _unpack(g)
    index = g.op("Add", g.op("Mul", s0, g.ints(context)), ids)
    logits = g.op("Gather", g.constant(table), g.op("Mod", index, g.ints(table.shape[0])))
    _give_candidates(g, logits, count)
    return g.save(path)


def _suffix(path: Path, model: Lookup, form: Form) -> Graph:
    g = _GraphBuilder()
    ids, s0 = _unpack(g)
    # The other way to the same cursor, so that those inputs are checked too. The total may be any number
    # from the end of this pass to the capacity: it hides nothing, but slots past it must not be looked at.
    width = g.op("Shape", ids)
    first = g.op("Add", g.op("Sub", g.to_ints(g.take("seqlens_k")), width), g.ints([1]))
    total = g.op("Reshape", g.to_ints(g.take("total_sequence_length")), g.ints([1]))
    own = g.op("Add", g.op("Range", g.ints(0), g.op("Squeeze", width), g.ints(1)), first)
    slots = _slots(g, 1)
    visible = g.op("And", g.op("LessOrEqual", slots, g.op("Unsqueeze", own, g.ints([1]))), g.op("Less", slots, total))
    s1 = _attend(g, 1, _layer_1_values(g, ids, s0, own), first, visible, form)
    logits = g.op("Gather", _table_rows(g, model, ids, s0, s1), g.take("logit_rows"))
    g.give("logits", g.op("Unsqueeze", logits, g.ints([0])), "float32", (1, "rows", model.vocab_size))
    if form is Form.INPLACE:
        likeliest = g.op("ArgMax", logits, axis=-1, keepdims=0)
        g.give("token_ids", g.op("Unsqueeze", likeliest, g.ints([0])), "int64", (1, "rows"))
    return g.save(path)


def _fed_ids(g: _GraphBuilder, ids: str) -> str:
    """Return ids with 1 + the id and s0 of the row before added where a row has a feature."""
    state = g.to_ints(g.op("Squeeze", g.take("features"), g.ints([0])))
    before = g.op("Add", g.op("Gather", state, g.ints(0), axis=1), g.op("Gather", state, g.ints(1), axis=1))
    has = g.to_ints(g.take("feature_rows"))
    return g.op("Add", ids, g.op("Mul", has, g.op("Add", before, g.ints(1))))


def _with_noise(g: _GraphBuilder, logits: str, vocab: int) -> str:
    noise = g.take("noise", "float32", (NOISE_POSITIONS, vocab))
    scores = g.op("Mul", logits, g.take("inverse_temperature"))
    return g.op("Add", scores, g.op("Gather", noise, g.take("noise_rows")))


def _draft(path: Path, spec: LookupBundle, form: Form, candidates: int | None, *, noise: bool = False) -> Graph:
    """Save the draft over branches, or, with a candidate count, over the window."""
    g = _GraphBuilder()
    assert spec.draft is not None
    model = spec.draft
    ids, positions = _flat(g, "input_ids"), _flat(g, "position_ids")
    if spec.feature_layer is not None:
        ids = _fed_ids(g, ids)
    first = g.to_ints(g.take("past_length"))
    slots = _slots(g, 0)
    own = g.op("Add", g.op("Range", g.ints(0), g.op("Squeeze", g.op("Shape", ids)), g.ints(1)), first)
    branch = g.op("Unsqueeze", g.take("row_branch"), g.ints([1]))
    same = g.op("Equal", g.op("Unsqueeze", g.take("slot_branch"), g.ints([0])), branch)
    mine = g.op("And", same, g.op("LessOrEqual", slots, g.op("Unsqueeze", own, g.ints([1]))))
    trunk = g.op("Less", slots, g.op("Unsqueeze", g.to_ints(g.take("row_visible")), g.ints([1])))
    visible = g.op("Or", mine, trunk)
    s0 = _attend(g, 0, _weighted(g, ids, positions, 7), first, visible, form)
    s1 = _attend(g, 1, _layer_1_values(g, ids, s0, positions), first, visible, form)
    logits = _table_rows(g, model, ids, s0, s1)
    logits = g.op("Gather", logits, g.take("logit_rows"))
    if noise:
        logits = _with_noise(g, logits, model.vocab_size)
    likeliest = g.op("ArgMax", logits, axis=-1, keepdims=0)
    g.give("token_ids", g.op("Unsqueeze", likeliest, g.ints([0])), "int64", (1, "rows"))
    if candidates is not None:
        _give_candidates(g, logits, candidates, "rows")
    return g.save(path)


def write_bundle(folder: Path, spec: LookupBundle) -> Path:
    """Write a bundle of lookup models into a new folder; return the folder."""
    folder.mkdir(parents=True)
    vocab = spec.target.vocab_size
    exit_table = spec.exit_table if spec.exit_table is not None else np.zeros((1, vocab), np.float32)
    count = min(spec.kappa + 1, vocab)
    segments = {
        "target_prefix": _segment(folder, spec, "target_prefix", (0,), lambda path, form: _prefix(path, form)),
        "exit_head": _segment(
            folder, spec, "exit_head", (), lambda path, form: _exit_head(path, exit_table, spec.target.context, count)
        ),
        "target_suffix": _segment(
            folder, spec, "target_suffix", (1,), lambda path, form: _suffix(path, spec.target, form)
        ),
    }
    draft = spec.draft
    if draft is not None and spec.draft_kind == "model":
        for name, candidates in (("draft_trunk", count), ("draft", None)):
            segments[name] = _segment(
                folder, spec, name, (0, 1), lambda path, form, some=candidates: _draft(path, spec, form, some)
            )
        if spec.samples:
            np.save(folder / VOCABULARY_FILE, np.arange(draft.vocab_size))
            graph = _draft(folder / "draft_sampled.onnx", spec, Form.INPLACE, count, noise=True)
            segments["draft_sampled"] = Segment("draft_sampled", segments["draft"].kv, {Form.INPLACE: graph})
    write_manifest(folder, _manifest(folder, spec, segments))
    return folder


def _segment(
    folder: Path, spec: LookupBundle, name: str, layers: Sequence[int], build: Callable[[Path, Form], Graph]
) -> Segment:
    graphs = {}
    for form in spec.forms:
        suffix = ".rows.onnx" if form is Form.ROWS else ".onnx"
        graphs[form] = build(folder / f"{name}{suffix}", form)
    return Segment(name, tuple(LayerKV(layer, 1, 1, "float32") for layer in layers), graphs)


def _manifest(folder: Path, spec: LookupBundle, segments: dict[str, Segment]) -> Manifest:
    vocab = spec.target.vocab_size
    facts = None
    if spec.draft_kind == "ngram":
        facts = DraftFacts("ngram", "ngram", 0, vocab, vocab)
    elif spec.draft is not None:
        facts = DraftFacts(
            "model", "lookup", 2, spec.draft.vocab_size, spec.draft.vocab_size, spec.streams, spec.feature_layer
        )
    print_of = hashlib.sha256(spec.target.table.tobytes()).hexdigest()
    return Manifest(
        schema_version=SCHEMA_VERSION,
        producer=Producer("0", "lookup", "tests"),
        model=ModelFacts("Lookup", "lookup", 2, HIDDEN, vocab, spec.max_length + 64, "fp32", print_of),
        decoding=Decoding(1, spec.gamma, spec.kappa, spec.max_length, spec.prefill_chunk),
        tokens=Tokens(None, spec.eos, None, print_of),
        draft=facts,
        segments=segments,
        files={
            path.name: FileFacts(path.stat().st_size, file_sha256(path))
            for path in sorted([*folder.glob("*.onnx"), *folder.glob("*.npy")])
        },
    )


def oracle_logits(model: Lookup, tokens: Sequence[int]) -> Table:
    """Return the logits after a context, float32 [vocab], without cache, window or graph."""
    s0 = s1 = 0
    for position, token in enumerate(tokens):
        s0 += token * (1 + position % 7)
        s1 += (s0 + token) % 11 * (1 + position % 5)
    row = (model.context * (s0 + 3 * s1) + tokens[-1]) % model.table.shape[0]
    return np.asarray(model.table[row])


def oracle_fed(draft: Lookup, tokens: Sequence[int], fed: int) -> Table:
    """Return a fed draft's logits after a context of which positions 1..fed have a feature."""
    s0, ids = 0, []
    for position, token in enumerate(tokens):
        ids.append(token + (1 + tokens[position - 1] + s0 if 1 <= position <= fed else 0))
        s0 += token * (1 + position % 7)
    return oracle_logits(draft, ids)


def oracle_greedy(model: Lookup, prompt: Sequence[int], count: int, eos: Sequence[int] = ()) -> list[int]:
    """Return the greedy continuation of a prompt, by the table alone."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count and (len(tokens) == len(prompt) or tokens[-1] not in eos):
        tokens.append(int(np.argmax(oracle_logits(model, tokens))))
    return tokens[len(prompt) :]


def random_table(seed: int, rows: int, vocab: int, spread: float = 2.0) -> Table:
    """Return a random table of logits, float32 [rows, vocab]."""
    return (spread * np.random.default_rng(seed).standard_normal((rows, vocab))).astype(np.float32)


def agreeing_table(table: Table, agreement: float, seed: int) -> Table:
    """Return a copy of a table whose likeliest token is the same in about a share of the rows."""
    random = np.random.default_rng(seed)
    other = table.copy()
    for row in np.flatnonzero(random.random(table.shape[0]) >= agreement):
        other[row] = np.roll(other[row], 1 + random.integers(table.shape[1] - 1))
    return other


def open_engine(
    folder: Path, options: EngineOptions, *, target: Device | None = None, draft: Device | None = None
) -> Engine:
    """Load a bundle on the CPU, or on the devices given."""
    return Engine(folder, read_manifest(folder), options, target or CpuDevice(), draft or CpuDevice())


def chi_square(counts: NDArray[np.int64], law: NDArray[np.float64]) -> tuple[float, int]:
    """Return Pearson's statistic and its degrees of freedom; a token without mass must never come."""
    possible = law > 0
    assert counts[~possible].sum() == 0, "a token outside the support was drawn"
    expected = counts.sum() * law[possible]
    return float(((counts[possible] - expected) ** 2 / expected).sum()), int(possible.sum()) - 1


def chi_square_limit(degrees: int, false_alarm: float) -> float:
    """Return a bound that a chi-square variable passes with at most these odds (Laurent and Massart)."""
    x = -np.log(false_alarm)
    return float(degrees + 2 * np.sqrt(degrees * x) + 2 * x)


def softmax(logits: Table) -> NDArray[np.float64]:
    """Return the law of some logits, float64."""
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return weights / weights.sum()


def main() -> None:
    """Write the bundle that `mirror.bench.host_work` is run on: a real vocabulary, graphs that cost little."""
    folder, vocab = Path(sys.argv[1]), 49152
    target = random_table(1, 7, vocab)
    draft = Lookup(agreeing_table(target, 0.5, 2))
    exit_table = random_table(3, 7, vocab)
    write_bundle(folder, LookupBundle(Lookup(target), draft, exit_table, gamma=7, kappa=8, max_length=512))


if __name__ == "__main__":
    main()
