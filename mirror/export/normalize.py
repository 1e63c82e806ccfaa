"""Traced graph -> the small vocabulary of operators that lowering knows.

After `normalize` every linear layer is one `mirror::Linear(x, weight[, bias])` with the weight as the
checkpoint stores it (`[out, in]`), every reshape has a constant shape, rotary tables are initializers
looked up by position, and nothing is computed twice.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
import onnx_ir.convenience as ir_convenience
import onnx_ir.passes.common as ir_passes
import onnxruntime as ort
from numpy.typing import NDArray

from mirror.export.graphs import constant, dtype_of, insert_before, int64s, is_op, producer_input, replace, wired
from mirror.export.trace import DOMAIN, Aliases, Traced

WIDTH = "width"


def normalize(traced: Traced, positions: int) -> ir.Model:
    """Normalise a traced graph in place and return it.

    Args:
        positions: rows of the rotary tables, that is the largest position plus one.
    """
    model = traced.model
    _constant_shapes(model.graph)
    passes = ir.passes.Sequential(
        ir_passes.ClearMetadataAndDocStringPass(),  # the tracer's notes name files of this machine
        ir_passes.IdentityEliminationPass(),
        ir_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        ir_passes.CommonSubexpressionEliminationPass(),
        ir_passes.DeduplicateInitializersPass(size_limit=4096),
        ir_passes.RemoveUnusedNodesPass(),
    )
    with _quiet():
        passes(model)
    _linear_layers(model.graph, traced.parameters)
    _rotary_tables(model, positions)
    ir_passes.RemoveUnusedNodesPass()(model)
    model.graph.opset_imports[DOMAIN] = 1
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the warnings about parameters without data: they get theirs later."""
    logger = logging.getLogger("onnx_ir")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _constant_shapes(graph: ir.Graph) -> None:
    """Give each Reshape a constant shape: batch is 1 and only the width is open."""
    for node in list(graph):
        if not is_op(node, "Reshape"):
            continue
        shape = node.outputs[0].shape
        if shape is None:
            continue
        open_dimensions = [index for index, size in enumerate(shape) if not isinstance(size, int)]
        if len(open_dimensions) > 1 or any(size == 0 for size in shape):
            continue
        sizes = [size if isinstance(size, int) else -1 for size in shape]
        node.replace_input_with(1, int64s(graph, *sizes))


def _linear_layers(graph: ir.Graph, parameters: dict[str, Aliases]) -> None:
    for node in list(graph):
        if not is_op(node, "MatMul"):
            continue
        x, factor = wired(*node.inputs)
        weight = producer_input(factor)
        if weight is None or not is_op(factor.producer(), "Transpose") or weight.name not in parameters:
            continue
        anchor, inputs = node, [x, weight]
        bias = _bias_add(node, parameters)
        if bias is not None:
            anchor, inputs = bias[0], [*inputs, bias[1]]
        output = insert_before(graph, anchor, "Linear", inputs, domain=DOMAIN, like=anchor.outputs[0])
        replace(graph, anchor, output)
        if anchor is not node:
            graph.remove(node, safe=True)


def _bias_add(node: ir.Node, parameters: dict[str, Aliases]) -> tuple[ir.Node, ir.Value] | None:
    """Return the Add that gives a MatMul its bias, and the bias."""
    uses = list(node.outputs[0].uses())
    if len(uses) != 1 or uses[0].node.op_type != "Add" or node.outputs[0].is_graph_output():
        return None
    add = uses[0].node
    other = add.inputs[1 - uses[0].idx]
    if other is None or other.name not in parameters or other.shape is None or len(other.shape) != 1:
        return None
    return add, other


def _rotary_tables(model: ir.Model, positions: int) -> None:
    """Replace the angles' arithmetic by tables `[positions, rotary_dim / 2]` looked up by position."""
    graph = model.graph
    tables: dict[str, ir.Value] = {}
    for node in list(graph):
        if not is_op(node, "Rotary", DOMAIN):
            continue
        x, cos, sin = wired(*node.inputs)
        interleaved = node.attributes["interleaved"].as_int() == 1
        for value in (cos, sin):
            assert value.name is not None
            if value.name not in tables:
                table = _half(_over_positions(model, value, positions), interleaved)
                tables[value.name] = constant(graph, f"rotary_table_{len(tables)}", table)
        inputs = [x, tables[str(cos.name)], tables[str(sin.name)], graph.inputs[1]]
        output = insert_before(
            graph,
            node,
            "Rotary",
            inputs,
            domain=DOMAIN,
            like=node.outputs[0],
            attributes={"interleaved": int(interleaved)},
        )
        replace(graph, node, output)


def _over_positions(model: ir.Model, value: ir.Value, positions: int) -> NDArray[np.generic]:
    """Return a value that depends on `position_ids` alone, computed at positions 0..positions-1."""
    ids = model.graph.inputs[1]
    part = ir_convenience.extract(model.graph, [ids], [value])
    # numpy, and so the session's result, has no bfloat16.
    widened = ir.node("Cast", [part.outputs[0]], {"to": int(ir.DataType.FLOAT)})
    part.append(widened)
    part.outputs[0] = widened.outputs[0]
    widened.outputs[0].name, widened.outputs[0].type = "widened", ir.TensorType(ir.DataType.FLOAT)
    proto = ir.to_proto(ir.Model(part, ir_version=10))
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    result = np.asarray(session.run(None, {"position_ids": np.arange(positions, dtype=np.int64)[None]})[0])
    table = np.asarray(np.broadcast_to(result, (1, positions, result.shape[-1]))[0])
    return table.astype(dtype_of(value).numpy(), copy=False)


def _half(table: NDArray[np.generic], interleaved: bool) -> NDArray[np.generic]:
    return np.ascontiguousarray(table[:, ::2] if interleaved else table[:, : table.shape[1] // 2])
