"""A draft's source graph of integers -> its program: what kernels need to run the draft's whole pass in one call.

Those kernels (hosts/kernels/draft_pass.h) know one shape of decoder, Llama's. The graph is followed from the embedding
lookup to the logits, node by node; if any node is left over, or is another than expected, the draft has no program.
Weights are pointed at where they lie in the bundle's files and never read.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

import onnx_ir as ir

from mirror.bundle import PROGRAM_FORMAT
from mirror.export.draft_inputs import FEATURE_WEIGHT, STREAMS
from mirror.export.graphs import is_op, sizes
from mirror.export.quantize import BLOCK, ORT
from mirror.export.trace import DOMAIN
from mirror.export.vocabulary import IDS

LANES = 16  # features that the kernels take at once: heads, states and MLPs are whole multiples
_MOST_LEAST_MAGNITUDE = 1e-6  # above it, evening an MLP's rows would not be for their rounding alone
_HEADS_FIRST = (0, 2, 1, 3)
_FLOAT = ir.DataType.FLOAT
_NAMES = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
    ir.DataType.INT8: "int8",
    ir.DataType.UINT8: "uint8",
    ir.DataType.INT64: "int64",
}
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_FACTS = ("hidden", "heads", "kv_heads", "head_dim", "inner", "tokens", "positions", "epsilon", "scale")
# They change nothing here: no constant shape has zeros, and axes are always given.
_IDLE_ATTRIBUTES = frozenset({"allowzero", "noop_with_empty_axes"})

Json = dict[str, Any]


def draft_program(source: ir.Model) -> Json | None:
    """Return a draft's program as JSON (docs/bundle.md), None where its graph is of another shape.

    Args:
        source: the draft's source graph of integers, its external tensors relative to the bundle; not changed.
    """
    try:
        return _Reader(source.graph).program()
    except _OtherShapeError:
        return None


class _OtherShapeError(Exception):
    """The graph isn't the decoder that the kernels know."""


@dataclass(frozen=True)
class _Product:
    """A linear layer's result `[1, width, size]`, and its weights as JSON."""

    output: ir.Value
    size: int
    matrix: Json


@dataclass
class _Reader:
    """Follows one graph; `read` are the nodes that it met, `facts` what must be the same wherever it appears."""

    graph: ir.Graph
    read: set[ir.Node] = field(default_factory=set)
    facts: dict[str, Any] = field(default_factory=dict)

    def program(self) -> Json:
        """Return the program.

        Raises:
            _OtherShapeError: the graph is of another shape.
        """
        graph, facts = self.graph, self.facts
        _must([value.name for value in graph.inputs] == ["input_ids", "position_ids"])
        _must([value.name for value in graph.outputs] == ["logits"] and FEATURE_WEIGHT not in graph.initializers)
        value, embedding = self._embedding()
        layers = []
        for layer in range(sum(is_op(node, "LayerOutput", DOMAIN) for node in graph)):
            value, described = self._layer(value, layer)
            layers.append(described)
        normed, norm = self._norm(value, facts["hidden"])
        head = self._product(normed, facts["hidden"])
        _must(layers != [] and head.output is graph.outputs[0] and len(self.read) == len(graph))
        _must(facts["hidden"] % LANES == 0 and facts["inner"] % LANES == 0)
        streams, ids = graph.initializers.get(STREAMS), graph.initializers.get(IDS)
        count = 0 if streams is None else _sizes(streams)[0]
        cosines, sines = facts["tables"]
        table = [facts["positions"], facts["head_dim"] // 2]
        return {
            "format": PROGRAM_FORMAT,
            **{name: facts[name] for name in _FACTS},
            "streams": count,
            "embedding": embedding,
            "stream_rows": None if streams is None else _tensor(streams, _FLOAT, [count, facts["hidden"]]),
            "cosines": _tensor(cosines, _FLOAT, table),
            "sines": _tensor(sines, _FLOAT, table),
            "layers": layers,
            "norm": norm,
            "head": head.matrix,
            "vocabulary": None if ids is None else _tensor(ids, ir.DataType.INT64, [head.size]),
        }

    # --- the embedding ----------------------------------------------------------------------------

    def _embedding(self) -> tuple[ir.Value, Json]:
        """Return the looked up rows, float32 `[1, width, hidden]`, and how the table is stored."""
        ids = self.graph.inputs[0]
        gather = self._find("Gather", [None, ids], {"axis": 0})
        lookup = gather or self._step(
            "GatherBlockQuantized",
            [None, ids, None],
            {"bits": None, "block_size": BLOCK, "gather_axis": 0, "quantize_axis": 1},
            domain=ORT,
        )
        stored = self._blocks(lookup) if gather is None else self._table(gather)
        rows = lookup.outputs[0]
        if (stored["scales"] or stored["values"])["dtype"] != _NAMES[_FLOAT]:
            rows = self._step("Cast", [rows], {"to": int(_FLOAT)}).outputs[0]
        return rows, stored

    def _table(self, lookup: ir.Node) -> Json:
        tokens, hidden = _sizes(lookup.inputs[0], 2)
        self._same(tokens=tokens, hidden=hidden)
        values = _tensor(lookup.inputs[0], _FLOATS, [tokens, hidden])
        return {"kind": values["dtype"], "values": values, "scales": None}

    def _blocks(self, lookup: ir.Node) -> Json:
        bits = _attributes(lookup)["bits"]
        _must(bits in (4, 8))
        tokens, blocks = _sizes(lookup.inputs[2], 2)
        self._same(tokens=tokens, hidden=blocks * BLOCK)
        values = _tensor(lookup.inputs[0], ir.DataType.UINT8, [tokens, blocks * BLOCK * bits // 8])
        scales = _tensor(lookup.inputs[2], _FLOATS, [tokens, blocks])
        return {"kind": f"blocks_{bits}", "values": values, "scales": scales}

    # --- a layer ----------------------------------------------------------------------------------

    def _layer(self, x: ir.Value, layer: int) -> tuple[ir.Value, Json]:
        """Return a layer's output, `[1, width, hidden]` as its input `x`, and its weights."""
        hidden = self.facts["hidden"]
        normed, attention_norm = self._norm(x, hidden)
        attended, attention = self._attention(normed, layer)
        x = self._step("Add", [x, attended], any_order=True).outputs[0]
        normed, mlp_norm = self._norm(x, hidden)
        change, mlp = self._mlp(normed)
        x = self._step("Add", [x, change], any_order=True).outputs[0]
        output = self._step("LayerOutput", [x], {"layer": layer}, domain=DOMAIN).outputs[0]
        return output, {"attention_norm": attention_norm, "mlp_norm": mlp_norm, **attention, **mlp}

    def _attention(self, normed: ir.Value, layer: int) -> tuple[ir.Value, Json]:
        qkv = self._product(normed, self.facts["hidden"])
        split = self._step("Split", [qkv.output, None], {"axis": -1})
        parts = _ints(split.inputs[1])
        _must(len(parts) == len(split.outputs) == 3 and sum(parts) == qkv.size)
        query, heads, query_norm = self._heads(split.outputs[0], parts[0], may_be_normed=True)
        key, kv_heads, key_norm = self._heads(split.outputs[1], parts[1], may_be_normed=True)
        value, value_heads, _ = self._heads(split.outputs[2], parts[2], may_be_normed=False)
        _must(value_heads == kv_heads and heads % kv_heads == 0)
        self._same(heads=heads, kv_heads=kv_heads)
        mixed = self._step(
            "Attention",
            [self._rotated(query), self._rotated(key), value],
            {"layer": layer, "scale": None, "window": 0, "softcap": 0.0},
            domain=DOMAIN,
        )
        self._same(scale=_attributes(mixed)["scale"])
        flat = self._step("Reshape", [mixed.outputs[0], None])
        _must(_ints(flat.inputs[1]) == [1, -1, parts[0]])
        output = self._product(flat.outputs[0], parts[0])
        _must(output.size == self.facts["hidden"])
        weights = {"query_norm": query_norm, "key_norm": key_norm, "qkv": qkv.matrix, "output": output.matrix}
        return output.output, weights

    def _heads(self, flat: ir.Value, features: int, *, may_be_normed: bool) -> tuple[ir.Value, int, Json | None]:
        """`[1, width, features]` -> `[1, heads, width, head_dim]`, the number of heads, their norm's weight."""
        reshape = self._step("Reshape", [flat, None])
        shape = _ints(reshape.inputs[1])
        _must(len(shape) == 4 and shape[:2] == [1, -1])
        heads, head_dim = shape[2:]
        _must(heads * head_dim == features and head_dim % LANES == 0)
        self._same(head_dim=head_dim)
        value, norm = reshape.outputs[0], None
        if may_be_normed and any(is_op(use.node, "RMSNorm", DOMAIN) for use in value.uses()):
            value, norm = self._norm(value, head_dim)
        return self._step("Transpose", [value], {"perm": _HEADS_FIRST}).outputs[0], heads, norm

    def _rotated(self, value: ir.Value) -> ir.Value:
        positions = self.graph.inputs[1]
        rotary = self._step("Rotary", [value, None, None, positions], {"interleaved": 0}, domain=DOMAIN)
        self._same(tables=(rotary.inputs[1], rotary.inputs[2]), positions=_sizes(rotary.inputs[1])[0])
        return rotary.outputs[0]

    def _mlp(self, normed: ir.Value) -> tuple[ir.Value, Json]:
        """Return `down(silu(gate(x)) * up(x))`, `[1, width, hidden]`, and its weights."""
        gate_up = self._product(normed, self.facts["hidden"])
        split = self._step("Split", [gate_up.output, None], {"axis": -1})
        inner = gate_up.size // 2
        _must(_ints(split.inputs[1]) == [inner, inner] and len(split.outputs) == 2)
        self._same(inner=inner)
        gate, up = split.outputs
        opened = self._step("Sigmoid", [gate]).outputs[0]
        silu = self._step("Mul", [gate, opened], any_order=True).outputs[0]
        value = self._step("Mul", [silu, up], any_order=True).outputs[0]
        largest = self._largest_of_rows(value)
        if largest is not None:
            value = self._step("Div", [value, largest]).outputs[0]
        down = self._product(value, inner, largest)
        _must(down.size == self.facts["hidden"])
        return down.output, {"gate_up": gate_up.matrix, "down": down.matrix}

    def _largest_of_rows(self, value: ir.Value) -> ir.Value | None:
        """Return what `Binder` divides rows by before it rounds them all by one scale, if it does so.

        The kernels round each row by a scale of its own, so to them it means nothing.
        """
        magnitudes = self._find("Abs", [value])
        if magnitudes is None:
            return None
        largest = self._step("ReduceMax", [magnitudes.outputs[0], None], {"keepdims": 1})
        _must(_ints(largest.inputs[1]) == [-1])
        bounded = self._step("Max", [largest.outputs[0], None])
        least = bounded.inputs[1].const_value if bounded.inputs[1] is not None else None
        _must(least is not None and list(least.shape) == [] and not isinstance(least, ir.ExternalTensor))
        assert least is not None
        _must(0 < float(least.numpy()) <= _MOST_LEAST_MAGNITUDE)
        return bounded.outputs[0]

    # --- what layers are made of ------------------------------------------------------------------

    def _norm(self, x: ir.Value, size: int) -> tuple[ir.Value, Json]:
        node = self._step("RMSNorm", [x, None], {"epsilon": None}, domain=DOMAIN)
        self._same(epsilon=_attributes(node)["epsilon"])
        return node.outputs[0], _tensor(node.inputs[1], _FLOAT, [size])

    def _product(self, x: ir.Value, size: int, largest: ir.Value | None = None) -> _Product:
        """Return a linear layer of `x`, `[1, width, size]`.

        Args:
            largest: what its rows were divided by, and its results are multiplied by.
        """
        node = self._step("DynamicQuantizeMatMul", [x, None, None], domain=ORT)
        output, out = node.outputs[0], _sizes(node.inputs[1])[-1]
        values = _tensor(node.inputs[1], ir.DataType.INT8, [size, out])
        scales = _tensor(node.inputs[2], _FLOAT, [out])
        if largest is not None:
            output = self._step("Mul", [output, largest], any_order=True).outputs[0]
        biased, bias = self._find("Add", [output, None], any_order=True), None
        if biased is not None:
            output = biased.outputs[0]
            (added,) = (value for value in biased.inputs if self._is_initializer(value))
            bias = _tensor(added, _FLOAT, [out])
        return _Product(output, out, {"values": values, "scales": scales, "bias": bias})

    # --- following nodes --------------------------------------------------------------------------

    def _same(self, **facts: object) -> None:
        """Note facts, each of which must be what it was where it was noted before."""
        for name, fact in facts.items():
            _must(self.facts.setdefault(name, fact) == fact)

    def _step(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, object] | None = None,
        *,
        domain: str = "",
        any_order: bool = False,
    ) -> ir.Node:
        """Return the one node of an operator that reads some values.

        Args:
            inputs: all that it reads, None for any initializer.
            attributes: all that it has, None for any value.
            any_order: whether it may have them the other way round.

        Raises:
            _OtherShapeError: there is none such, or more than one.
        """
        node = self._find(op_type, inputs, attributes, domain=domain, any_order=any_order)
        if node is None:
            raise _OtherShapeError
        return node

    def _find(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, object] | None = None,
        *,
        domain: str = "",
        any_order: bool = False,
    ) -> ir.Node | None:
        """Return the node that `_step` would, None if there is none such."""
        known = next(value for value in inputs if value is not None)
        readers = {use.node for use in known.uses() if is_op(use.node, op_type, domain)}
        orders = [inputs, inputs[::-1]] if any_order else [inputs]
        fitting = [node for node in readers if any(self._reads(node, order) for order in orders)]
        fitting = [node for node in fitting if _has(node, attributes or {})]
        _must(len(fitting) <= 1)
        self.read.update(fitting)
        return fitting[0] if fitting else None

    def _reads(self, node: ir.Node, inputs: Sequence[ir.Value | None]) -> bool:
        found = list(node.inputs)
        while found and found[-1] is None:  # an optional input that is left out
            found.pop()
        return len(found) == len(inputs) and all(
            self._is_initializer(value) if wanted is None else value is wanted
            for value, wanted in zip(found, inputs, strict=True)
        )

    def _is_initializer(self, value: ir.Value | None) -> bool:
        return value is not None and self.graph.initializers.get(str(value.name)) is value


def _must(holds: bool) -> None:
    if not holds:
        raise _OtherShapeError


def _has(node: ir.Node, attributes: Mapping[str, object]) -> bool:
    found = {name: value for name, value in _attributes(node).items() if name not in _IDLE_ATTRIBUTES}
    return found.keys() == attributes.keys() and all(
        wanted is None or found[name] == wanted for name, wanted in attributes.items()
    )


def _attributes(node: ir.Node) -> Json:
    """Return a node's attributes as plain numbers and tuples of them."""
    return {
        name: tuple(attribute.value) if isinstance(attribute.value, list | tuple) else attribute.value
        for name, attribute in node.attributes.items()
    }


def _sizes(value: ir.Value | None, count: int | None = None) -> list[int]:
    """Return an initializer's shape, which must have `count` dimensions, or at least one."""
    tensor = value.const_value if value is not None else None
    if tensor is None:
        raise _OtherShapeError
    found = sizes(tensor)
    _must(bool(found) if count is None else len(found) == count)
    return found


def _ints(value: ir.Value | None) -> list[int]:
    """Return a short list of whole numbers that the graph itself holds."""
    tensor = value.const_value if value is not None else None
    if tensor is None or isinstance(tensor, ir.ExternalTensor) or tensor.dtype is not ir.DataType.INT64:
        raise _OtherShapeError
    return [int(number) for number in tensor.numpy().reshape(-1)]


def _tensor(value: ir.Value | None, dtypes: ir.DataType | tuple[ir.DataType, ...], shape: list[int]) -> Json:
    """Return where an initializer lies, which must have one of some types and a shape; or its bytes if it is inline."""
    allowed = (dtypes,) if isinstance(dtypes, ir.DataType) else dtypes
    tensor = value.const_value if value is not None else None
    if tensor is None or tensor.dtype not in allowed or sizes(tensor) != shape:
        raise _OtherShapeError
    facts = {"dtype": _NAMES[tensor.dtype], "shape": shape}
    if not isinstance(tensor, ir.ExternalTensor):
        return {"data": base64.b64encode(tensor.tobytes()).decode("ascii"), **facts}
    _must(tensor.length in (None, tensor.nbytes))
    return {"file": PurePath(tensor.location).as_posix(), "offset": tensor.offset or 0, "bytes": tensor.nbytes, **facts}
