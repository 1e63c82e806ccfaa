"""Small operations on ONNX graphs that every step of the export shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
import onnx_ir.convenience as ir_convenience
from numpy.typing import NDArray

Attribute = int | float | str | Sequence[int]


def constant(graph: ir.Graph, name: str, array: NDArray[np.generic]) -> ir.Value:
    """Return the initializer of that name, adding it if the graph does not have it."""
    if name in graph.initializers:
        return graph.initializers[name]
    tensor = ir.tensor(array, name=name)
    shape = ir.Shape(list(array.shape))
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
    graph.register_initializer(value)
    return value


def int64s(graph: ir.Graph, *numbers: int) -> ir.Value:
    """Return a one-dimensional int64 initializer."""
    return constant(graph, "int64_" + "_".join(str(number) for number in numbers), np.array(numbers, np.int64))


def insert_before(
    graph: ir.Graph,
    anchor: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, Attribute] | None = None,
    *,
    domain: str = "",
    like: ir.Value | None = None,
) -> ir.Value:
    """Insert a node with one output before `anchor`; the output gets the type and shape of `like`."""
    node = ir.node(op_type, inputs, attributes, domain=domain)
    output = node.outputs[0]
    if like is not None:
        output.type, output.shape = like.type, like.shape
    graph.insert_before(anchor, node)
    return output


def replace(graph: ir.Graph, node: ir.Node, new: ir.Value) -> None:
    """Let `new` take the place of a node's only output, its name included where it is a graph output."""
    old = node.outputs[0]
    if old.is_graph_output():
        name = old.name
        old.name = f"{name}_replaced"
        new.name = name
        new.type, new.shape = old.type, old.shape
    ir_convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def is_op(node: ir.Node | None, op_type: str, domain: str = "") -> bool:
    """Whether a node is this operator."""
    return node is not None and (node.domain, node.op_type) == (domain, op_type)


def sizes(value: ir.Value | ir.TensorProtocol) -> list[int]:
    """Return the shape of a value all of whose dimensions are known."""
    assert value.shape is not None
    known = [size for size in value.shape if isinstance(size, int)]
    assert len(known) == len(value.shape), f"{value.name} has an open dimension: {value.shape}"
    return known


def dimension(value: ir.Value | None, axis: int) -> int:
    """Return one known dimension of a value."""
    assert value is not None
    assert value.shape is not None
    size = value.shape[axis]
    assert isinstance(size, int), f"dimension {axis} of {value.name} is open: {value.shape}"
    return size


def wired(*values: ir.Value | None) -> list[ir.Value]:
    """Return node inputs, none of which may be missing."""
    present = [value for value in values if value is not None]
    assert len(present) == len(values), "an operator lacks an input that it needs"
    return present


def producer_input(value: ir.Value | None) -> ir.Value | None:
    """Return the first input of the node that makes a value."""
    node = value.producer() if value is not None else None
    return node.inputs[0] if node is not None else None


def dtype_of(value: ir.Value) -> ir.DataType:
    """Return a value's known element type."""
    assert value.dtype is not None, f"{value.name} has no element type"
    return value.dtype
