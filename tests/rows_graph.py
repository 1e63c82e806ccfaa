"""A tiny real transformer in rows form, in standard operators, with everything that a device must keep apart.

Two layers, grouped queries, rotary positions, the branch mask of docs/bundle.md. Random weights in an
external file, as in a bundle. Its logits change with any wrong slot, position, branch or stale row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from mirror.bundle import Form, Graph, LayerKV, Segment, TensorSpec, kv_names

VOCAB, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 96, 32, 4, 2, 8, 2
_TYPES = {"int64": TensorProto.INT64, "int32": TensorProto.INT32, "float32": TensorProto.FLOAT}

_INPUTS = (
    TensorSpec("input_ids", "int64", (1, "width")),
    TensorSpec("position_ids", "int64", (1, "width")),
    TensorSpec("logit_rows", "int64", ("rows",)),
    TensorSpec("past_length", "int32", (1,)),
    TensorSpec("row_visible", "int32", ("width",)),
    TensorSpec("row_branch", "int32", ("width",)),
    TensorSpec("slot_branch", "int32", ("capacity",)),
)
_OUTPUTS = (
    TensorSpec("hidden_states", "float32", (1, "width", HIDDEN)),
    TensorSpec("logits", "float32", (1, "rows", VOCAB)),
    TensorSpec("token_ids", "int64", (1, "width")),
)


@dataclass
class _Builder:
    """Collects nodes and weights; calling it adds a node and returns its output's name."""

    random: np.random.Generator
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: list[onnx.TensorProto] = field(default_factory=list)

    def __call__(self, operator: str, *inputs: str | NDArray[Any], out: str | None = None, **attributes: Any) -> str:
        name = out or f"{operator}_{len(self.nodes)}"
        names = [item if isinstance(item, str) else self.constant(item) for item in inputs]
        self.nodes.append(helper.make_node(operator, names, [name], **attributes))
        return name

    def constant(self, values: NDArray[Any]) -> str:
        name = f"weight_{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def matrix(self, rows: int, columns: int) -> str:
        values = self.random.standard_normal((rows, columns)) / np.sqrt(rows)
        return self.constant(values.astype(np.float32))


def _ints(*values: int) -> NDArray[np.int64]:
    return np.array(values, np.int64)


def _norm(b: _Builder, x: str) -> str:
    mean = b("ReduceMean", b("Mul", x, x), _ints(-1), keepdims=1)
    return b("Div", x, b("Sqrt", b("Add", mean, np.float32(1e-5))))


def _count(b: _Builder, of: str, axis: int) -> str:
    """Return int32 0..n-1, where n is a dimension of a tensor."""
    size = b("Squeeze", b("Slice", b("Shape", of), _ints(axis), _ints(axis + 1)))
    return b("Cast", b("Range", np.array(0, np.int64), size, np.array(1, np.int64)), to=TensorProto.INT32)


def _mask(b: _Builder) -> str:
    """Return what is added to scores, float32 [1, 1, width, capacity + width]."""
    slots = _count(b, "past_key_values.0.key", 2)
    own = b("Add", _count(b, "input_ids", 1), "past_length")
    visible, branch, own_column = (b("Unsqueeze", name, _ints(1)) for name in ("row_visible", "row_branch", own))

    def seen(keys: str, branches: str) -> str:
        trunk = b("Less", keys, visible)
        same = b("And", b("Equal", branches, branch), b("LessOrEqual", keys, own_column))
        return b("Or", trunk, same)

    past = b("And", seen(slots, "slot_branch"), b("Less", slots, "past_length"))
    new = seen(own, "row_branch")
    return b("Where", b("Concat", past, new, axis=1), np.float32(0), np.float32(-1e9))


def _rotate(b: _Builder, x: str, cosine: str, sine: str) -> str:
    half = HEAD_DIM // 2
    first = b("Slice", x, _ints(0), _ints(half), _ints(3))
    second = b("Slice", x, _ints(half), _ints(HEAD_DIM), _ints(3))
    return b("Add", b("Mul", x, cosine), b("Mul", b("Concat", b("Neg", second), first, axis=3), sine))


def _angles(b: _Builder) -> tuple[str, str]:
    """Return cosine and sine of every row's angles, float32 [1, width, head_dim]."""
    speeds = (100.0 ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)).astype(np.float32)
    turns = b("Mul", b("Unsqueeze", b("Cast", "position_ids", to=TensorProto.FLOAT), _ints(2)), np.tile(speeds, 2))
    return b("Cos", turns), b("Sin", turns)


def _attention(b: _Builder, x: str, layer: int, mask: str, angles: tuple[str, str]) -> str:
    def heads(count: int, out: str | None = None, *, rotated: bool) -> str:
        split = b("Reshape", b("MatMul", x, b.matrix(HIDDEN, count * HEAD_DIM)), _ints(0, 0, count, HEAD_DIM))
        rows = b("Transpose", split, perm=[0, 2, 1, 3])
        return b("Identity", _rotate(b, rows, *angles) if rotated else rows, out=out)

    query = heads(HEADS, rotated=True)
    key, value = kv_names("present", layer)
    heads(KV_HEADS, key, rotated=True)
    heads(KV_HEADS, value, rotated=False)
    past = kv_names("past_key_values", layer)
    keys, values = (b("Concat", old, new, axis=2) for old, new in zip(past, (key, value), strict=True))
    keys, values = (b("Gather", part, _ints(0, 0, 1, 1), axis=1) for part in (keys, values))
    scores = b("Div", b("MatMul", query, b("Transpose", keys, perm=[0, 1, 3, 2])), np.float32(HEAD_DIM**0.5))
    mixed = b("MatMul", b("Softmax", b("Add", scores, mask), axis=-1), values)
    joined = b("Reshape", b("Transpose", mixed, perm=[0, 2, 1, 3]), _ints(0, 0, HEADS * HEAD_DIM))
    return b("MatMul", joined, b.matrix(HEADS * HEAD_DIM, HIDDEN))


def _network(b: _Builder) -> None:
    embedding = b.constant(b.random.standard_normal((VOCAB, HIDDEN)).astype(np.float32))
    mask, angles = _mask(b), _angles(b)
    x = b("Gather", embedding, "input_ids")
    for layer in range(LAYERS):
        x = b("Add", x, _attention(b, _norm(b, x), layer, mask, angles))
        up = b("MatMul", _norm(b, x), b.matrix(HIDDEN, 2 * HIDDEN))
        x = b("Add", x, b("MatMul", b("Mul", up, b("Sigmoid", up)), b.matrix(2 * HIDDEN, HIDDEN)))
    head = b("Transpose", embedding, perm=[1, 0])
    b("Identity", x, out="hidden_states")
    b("MatMul", b("Gather", _norm(b, x), "logit_rows", axis=1), head, out="logits")
    every = b("MatMul", _norm(b, x), head)
    top = b("ReduceMax", every, _ints(-1), keepdims=1)
    places = b("Where", b("GreaterOrEqual", every, top), np.arange(VOCAB, dtype=np.int32), np.int32(VOCAB - 1))
    b("Cast", b("ReduceMin", places, _ints(-1), keepdims=0), to=TensorProto.INT64, out="token_ids")


def write_segment(folder: Path, *, seed: int = 0) -> Segment:
    """Write the graph and its weights into a folder; return its record, as in `mirror.json`."""
    b = _Builder(np.random.default_rng(seed))
    _network(b)
    inputs, outputs = list(_INPUTS), list(_OUTPUTS)
    for layer in range(LAYERS):
        for past, present in zip(kv_names("past_key_values", layer), kv_names("present", layer), strict=True):
            inputs.append(TensorSpec(past, "float32", (1, KV_HEADS, "capacity", HEAD_DIM)))
            outputs.append(TensorSpec(present, "float32", (1, KV_HEADS, "width", HEAD_DIM)))
    values = [
        [helper.make_tensor_value_info(spec.name, _TYPES[spec.dtype], spec.shape) for spec in specs]
        for specs in (inputs, outputs)
    ]
    graph = helper.make_graph(b.nodes, "rows", *values, b.weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(
        model, folder / "tiny.rows.onnx", save_as_external_data=True, location="tiny.safetensors", size_threshold=1024
    )
    kv = tuple(LayerKV(layer, KV_HEADS, HEAD_DIM, "float32") for layer in range(LAYERS))
    return Segment("tiny", kv, {Form.ROWS: Graph("tiny.rows.onnx", tuple(inputs), tuple(outputs))})
