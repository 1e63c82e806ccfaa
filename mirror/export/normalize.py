"""Traced graph -> the small vocabulary of operators that lowering knows.

After `normalize` every linear layer is one `mirror::Linear(x, weight[, bias])` with the weight as the
checkpoint stores it (`[out, in]`), every reshape has a constant shape, rotary tables are initializers
looked up by position, and nothing is computed twice.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnx_ir.convenience as ir_convenience
import onnx_ir.passes.common as ir_passes
import onnxruntime as ort

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
    passes(model)
    _linear_layers(model.graph, traced.parameters)
    _rotary_tables(model, positions)
    ir_passes.RemoveUnusedNodesPass()(model)
    model.graph.opset_imports[DOMAIN] = 1
    return model


def constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """Return the initializer of that name, adding it if the graph does not have it."""
    if name in graph.initializers:
        return graph.initializers[name]
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
    graph.register_initializer(value)
    return value


def int64s(graph: ir.Graph, *numbers: int) -> ir.Value:
    """Return a one-dimensional int64 initializer."""
    return constant(graph, "int64_" + "_".join(str(number) for number in numbers), np.array(numbers, np.int64))


def insert_before(graph: ir.Graph, anchor: ir.Node, op: str, inputs: list[ir.Value | None], **options: object) -> ir.Value:
    """Insert a node with one output before `anchor`; options are `domain`, `attributes`, `name`, `like`."""
    like = options.get("like")
    attributes = options.get("attributes")
    node = ir.node(op, inputs, attributes, domain=str(options.get("domain", "")))  # type: ignore[arg-type]
    output = node.outputs[0]
    if isinstance(like, ir.Value):
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


def _constant_shapes(graph: ir.Graph) -> None:
    """Give each Reshape a constant shape: batch is 1 and only the width is open."""
    for node in list(graph):
        if (node.domain, node.op_type) != ("", "Reshape"):
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
        if (node.domain, node.op_type) != ("", "MatMul"):
            continue
        transpose = node.inputs[1].producer() if node.inputs[1] is not None else None
        if transpose is None or transpose.op_type != "Transpose" or not _is_weight(transpose.inputs[0], parameters):
            continue
        anchor, inputs = node, [node.inputs[0], transpose.inputs[0]]
        bias = _bias_add(node, parameters)
        if bias is not None:
            anchor, inputs = bias[0], [*inputs, bias[1]]
        output = insert_before(graph, anchor, "Linear", inputs, domain=DOMAIN, like=anchor.outputs[0])
        replace(graph, anchor, output)
        if anchor is not node:
            graph.remove(node, safe=True)


def _is_weight(value: ir.Value | None, parameters: dict[str, Aliases]) -> bool:
    return value is not None and value.name in parameters


def _bias_add(node: ir.Node, parameters: dict[str, Aliases]) -> tuple[ir.Node, ir.Value] | None:
    """Return the Add that gives a MatMul its bias, and the bias."""
    uses = list(node.outputs[0].uses())
    if len(uses) != 1 or uses[0].node.op_type != "Add" or node.outputs[0].is_graph_output():
        return None
    add = uses[0].node
    other = add.inputs[1 - uses[0].idx]
    if other is None or not _is_weight(other, parameters) or other.shape is None or len(other.shape) != 1:
        return None
    return add, other


def _rotary_tables(model: ir.Model, positions: int) -> None:
    """Replace the angles' arithmetic by tables `[positions, rotary_dim / 2]` looked up by position."""
    graph = model.graph
    tables: dict[str, ir.Value] = {}
    for node in list(graph):
        if (node.domain, node.op_type) != (DOMAIN, "Rotary"):
            continue
        x, cos, sin = node.inputs
        assert cos is not None and sin is not None
        interleaved = node.attributes["interleaved"].as_int() == 1
        for value in (cos, sin):
            assert value.name is not None
            if value.name not in tables:
                table = _half(_over_positions(model, value, positions), interleaved)
                tables[value.name] = constant(graph, f"rotary_table_{len(tables)}", table)
        inputs = [x, tables[str(cos.name)], tables[str(sin.name)], graph.inputs[1]]
        output = insert_before(
            graph, node, "Rotary", inputs, domain=DOMAIN, like=node.outputs[0], attributes={"interleaved": int(interleaved)}
        )
        replace(graph, node, output)


def _over_positions(model: ir.Model, value: ir.Value, positions: int) -> np.ndarray:
    """Return a value that depends on `position_ids` alone, computed at positions 0..positions-1."""
    ids = model.graph.inputs[1]
    part = ir_convenience.extract(model.graph, [ids], [value])
    proto = ir.to_proto(ir.Model(part, ir_version=10))
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, {"position_ids": np.arange(positions, dtype=np.int64)[None]})[0]
    return np.broadcast_to(result, (1, positions, result.shape[-1]))[0]


def _half(table: np.ndarray, interleaved: bool) -> np.ndarray:
    return np.ascontiguousarray(table[:, ::2] if interleaved else table[:, : table.shape[1] // 2])
