"""Join the query, key and value projections of a layer into one.

One wide product instead of three narrow ones, and one packed input to the attention operator. Done
where weights are written anyway, and in 16 bits: a float32 checkpoint whose bytes are used as they are stays unpacked.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from mirror.export.graphs import constant, dimension, insert_before, is_op, sizes
from mirror.export.trace import DOMAIN, Aliases

Parts = tuple[Aliases, ...]  # checkpoint tensors, joined along their first dimension


def single_parts(parameters: Mapping[str, Aliases]) -> dict[str, Parts]:
    """Return each parameter as one part."""
    return {name: (aliases,) for name, aliases in parameters.items()}


def pack_attention(graph: ir.Graph, parts: dict[str, Parts]) -> dict[str, Parts]:
    """Pack every layer's projections in place; return the parts that each initializer is now made of."""
    parts = dict(parts)
    for node in list(graph):
        if not is_op(node, "Attention", DOMAIN):
            continue
        linears = [_projection(value) for value in node.inputs]
        found = [linear for linear in linears if linear is not None]
        if len(found) == 3 and len({linear.inputs[0] for linear in found}) == 1 and _alike(found):
            _join(graph, found, parts)
    return parts


def _projection(value: ir.Value | None) -> ir.Node | None:
    """Return the linear layer that a query, key or value comes straight from (a rotary may lie between)."""
    node = value.producer() if value is not None else None
    for expected in ("Rotary", "Transpose", "Reshape"):
        if node is None:
            return None
        if node.op_type == expected:
            node = node.inputs[0].producer() if node.inputs[0] is not None else None
        elif expected != "Rotary":
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
