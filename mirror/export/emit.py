"""Append nodes to a graph, with the shorthands that lowering and masks share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mirror.export.graphs import constant, int64s

_INPUT_TYPES: Mapping[str, tuple[ir.DataType, tuple[int | str, ...]]] = {
    "input_ids": (ir.DataType.INT64, (1, "width")),
    "position_ids": (ir.DataType.INT64, (1, "width")),
    "logit_rows": (ir.DataType.INT64, ("rows",)),
    "seqlens_k": (ir.DataType.INT32, (1,)),
    "total_sequence_length": (ir.DataType.INT32, ()),
    "past_length": (ir.DataType.INT32, (1,)),
    "row_visible": (ir.DataType.INT32, ("width",)),
    "row_branch": (ir.DataType.INT32, ("width",)),
    "slot_branch": (ir.DataType.INT32, ("capacity",)),
    "feature_rows": (ir.DataType.FLOAT, ("width",)),
    "noise_rows": (ir.DataType.INT64, ("rows",)),
    "inverse_temperature": (ir.DataType.FLOAT, (1,)),
}


@dataclass
class Emitter:
    """Emits nodes before `anchor` (at the end where it is None) and declares graph inputs on first use.

    `size_from` is a value whose second dimension is the width of the pass.
    """

    graph: ir.Graph
    size_from: ir.Value
    anchor: ir.Node | None = None
    _cached: dict[str, ir.Value] = field(default_factory=dict)

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        *,
        domain: str = "",
        like: ir.Value | None = None,
    ) -> ir.Value:
        """Emit a node with one output and return it."""
        return self.ops(op_type, inputs, attributes, domain=domain, count=1, like=like)[0]

    def ops(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        *,
        domain: str = "",
        count: int,
        like: ir.Value | None = None,
    ) -> Sequence[ir.Value]:
        """Emit a node with `count` outputs and return them; the first gets the type of `like`."""
        node = ir.node(op_type, list(inputs), dict(attributes or {}), domain=domain, num_outputs=count)
        if like is not None:
            node.outputs[0].type, node.outputs[0].shape = like.type, like.shape
        if self.anchor is None:
            self.graph.append(node)
        else:
            self.graph.insert_before(self.anchor, node)
        return node.outputs

    def input(self, name: str) -> ir.Value:
        """Return a catalogue input of the graph, declaring it on first use."""
        for value in self.graph.inputs:
            if value.name == name:
                return value
        dtype, shape = _INPUT_TYPES[name]
        return self.declare(name, dtype, shape)

    def declare(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        """Add a graph input."""
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(list(shape)))
        self.graph.inputs.append(value)
        return value

    def constant(self, name: str, array: NDArray[np.generic]) -> ir.Value:
        """Return the named initializer."""
        return constant(self.graph, name, array)

    def int64s(self, *numbers: int) -> ir.Value:
        """Return a one-dimensional int64 initializer."""
        return int64s(self.graph, *numbers)

    def int32(self, number: int) -> ir.Value:
        """Return an int32 scalar initializer."""
        return self.constant(f"int32_{number}", np.array(number, np.int32))

    def reshape(self, value: ir.Value, *sizes: int) -> ir.Value:
        """Reshape; -1 is what remains."""
        return self.op("Reshape", [value, self.int64s(*sizes)])

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Convert a value's type."""
        return self.op("Cast", [value], {"to": int(dtype)})

    def row(self, value: ir.Value) -> ir.Value:
        """`[n]` -> `[1, n]`."""
        return self.op("Unsqueeze", [value, self.int64s(0)])

    def column(self, value: ir.Value) -> ir.Value:
        """`[n]` -> `[n, 1]`."""
        return self.op("Unsqueeze", [value, self.int64s(1)])

    def width(self) -> ir.Value:
        """Return the width of the pass, int32 `[1]`."""
        return self.size(self.size_from, 1)

    def size(self, value: ir.Value, axis: int) -> ir.Value:
        """Return one dimension of a value, int32 `[1]`; computed once."""
        key = f"{value.name}.{axis}"
        if key not in self._cached:
            size = self.op("Shape", [value], {"start": axis, "end": axis + 1})
            self._cached[key] = self.cast(size, ir.DataType.INT32)
        return self._cached[key]

    def range_to(self, stop: ir.Value) -> ir.Value:
        """Return int32 `[stop]`: 0, 1, 2...; `stop` is an int32 scalar that the graph is given, in host memory."""
        key = f"range_to.{stop.name}"
        if key not in self._cached:
            zero, one = (self.constant(f"int32_scalar_{n}", np.array(n, np.int32)) for n in (0, 1))
            self._cached[key] = self.op("Range", [zero, stop, one])
        return self._cached[key]

    def range(self, stop: ir.Value) -> ir.Value:
        """Return int32 `[stop]`: 0, 1, 2...; `stop` is int32 `[1]`."""
        key = f"range.{stop.name}.{id(stop)}"
        if key not in self._cached:
            # In int64, the type of shapes: shape inference takes an int32 size apart from its own zero and one.
            wide = self.op("Squeeze", [self.cast(stop, ir.DataType.INT64)])
            zero, one = (self.constant(f"int64_scalar_{n}", np.array(n, np.int64)) for n in (0, 1))
            self._cached[key] = self.cast(self.op("Range", [zero, wide, one]), ir.DataType.INT32)
        return self._cached[key]
