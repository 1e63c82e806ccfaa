"""Join the query, key and value projections of a layer into one, and its gate and up projections.

One wide product instead of several narrow ones, and one packed input to the attention operator. Done
where weights are written anyway, and in 16 bits: a float32 checkpoint whose bytes are used as they are stays unpacked.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from mirror.export.graphs import constant, dimension, insert_before, is_op, sizes
from mirror.export.trace import DOMAIN, Aliases

# What activations are made of.
_ELEMENTWISE = frozenset(
    {"Add", "Cast", "Clip", "Div", "Erf", "Gelu", "Mul", "Pow", "Relu", "Sigmoid", "Softplus", "Tanh"}
)

Parts = tuple[Aliases, ...]  # checkpoint tensors, joined along their first dimension


def single_parts(parameters: Mapping[str, Aliases]) -> dict[str, Parts]:
    """Return each parameter as one part."""
    return {name: (aliases,) for name, aliases in parameters.items()}


def pack_attention(graph: ir.Graph, parts: dict[str, Parts], *, normed: bool = False) -> dict[str, Parts]:
    """Pack every layer's projections in place; return the parts that each initializer is now made of.

    Args:
        normed: whether to pack those too whose heads are normed before anything else. The attention operator has no
            packed input then, so only the one product is won.
    """
    parts = dict(parts)
    for node in list(graph):
        if not is_op(node, "Attention", DOMAIN):
            continue
        linears = [_projection(value, normed=normed) for value in node.inputs]
        found = [linear for linear in linears if linear is not None]
        if len(found) == 3 and len({linear.inputs[0] for linear in found}) == 1 and _alike(found):
            _join(graph, found, parts)
    return parts


def pack_gates(graph: ir.Graph, parts: dict[str, Parts]) -> dict[str, Parts]:
    """Pack gate and up of every `act(gate(x)) * up(x)` in place; return the parts that each initializer is made of."""
    parts = dict(parts)
    for node in list(graph):
        if node.op_type != "Mul":
            continue
        for gated, value in (node.inputs, node.inputs[::-1]):
            up = value.producer() if value is not None else None
            if up is None or not is_op(up, "Linear", DOMAIN):
                continue
            gates = _linears_behind(gated)
            if len(gates) == 1 and gates[0] is not up and _joinable(gates[0], up):
                _join(graph, [gates[0], up], parts)
                break
    return parts


def _joinable(one: ir.Node, other: ir.Node) -> bool:
    """Whether two linear layers read the same, and both have a bias or none has."""
    return one.inputs[0] is other.inputs[0] and len(one.inputs) == len(other.inputs)


def _linears_behind(value: ir.Value | None) -> list[ir.Node]:
    """Return the linear layers that a value is an elementwise function of, and no others; none if it is of more."""
    found: list[ir.Node] = []
    waiting = [value]
    while waiting:
        current = waiting.pop()
        node = current.producer() if current is not None else None
        if node is None:  # a constant of the function
            continue
        if is_op(node, "Linear", DOMAIN):
            found += [node] if node not in found else []
        elif node.op_type in _ELEMENTWISE:
            waiting += node.inputs
        else:
            return []
    return found


def _projection(value: ir.Value | None, *, normed: bool) -> ir.Node | None:
    """Return the linear layer that a query, key or value comes straight from (a rotary may lie between, or a norm)."""
    node = value.producer() if value is not None else None
    for expected in ("Rotary", "Transpose", *(("RMSNorm",) if normed else ()), "Reshape"):
        if node is None:
            return None
        if node.op_type == expected:
            node = node.inputs[0].producer() if node.inputs[0] is not None else None
        elif expected not in ("Rotary", "RMSNorm"):
            return None
    return node if is_op(node, "Linear", DOMAIN) else None


def _alike(linears: list[ir.Node]) -> bool:
    """Whether all have a bias or none has, and nobody else uses their outputs."""
    return len({len(linear.inputs) for linear in linears}) == 1 and all(
        len(list(linear.outputs[0].uses())) == 1 for linear in linears
    )


def _join(graph: ir.Graph, linears: list[ir.Node], parts: dict[str, Parts]) -> None:
    first = linears[0]
    inputs: list[ir.Value | None] = [first.inputs[0]]
    for index in range(1, len(first.inputs)):
        values = [linear.inputs[index] for linear in linears]
        inputs.append(_joined_parameter(graph, [value for value in values if value is not None], parts))
    anchor = min(linears, key=lambda node: graph.index(node))
    packed = insert_before(graph, anchor, "Linear", inputs, domain=DOMAIN)
    widths = [dimension(linear.outputs[0], -1) for linear in linears]
    like = first.outputs[0]
    assert like.shape is not None
    packed.type, packed.shape = like.type, ir.Shape([*list(like.shape)[:-1], sum(widths)])
    split = constant(graph, "split_" + "_".join(map(str, widths)), np.array(widths, np.int64))
    node = ir.node("Split", [packed, split], {"axis": -1}, num_outputs=len(widths))
    graph.insert_before(anchor, node)
    for linear, output in zip(linears, node.outputs, strict=True):
        output.type, output.shape = linear.outputs[0].type, linear.outputs[0].shape
        for use in list(linear.outputs[0].uses()):
            use.node.replace_input_with(use.idx, output)
        graph.remove(linear, safe=True)


def _joined_parameter(graph: ir.Graph, values: list[ir.Value], parts: dict[str, Parts]) -> ir.Value:
    names = [str(value.name) for value in values]
    name = "+".join([names[0], *(other.rpartition(".")[0].rpartition(".")[2] for other in names[1:])])
    if name not in graph.initializers:
        rows = sum(dimension(value, 0) for value in values)
        shape = ir.Shape([rows, *sizes(values[0])[1:]])
        joined = ir.Value(name=name, type=values[0].type, shape=shape)
        graph.initializers[name] = joined
        parts[name] = tuple(part for value_name in names for part in parts[value_name])
        for value_name in names:
            parts.pop(value_name)
    return graph.initializers[name]
