"""Name the gated products of a graph: `silu(gate(x)) * up(x)`, gate and up one matrix, as one operator each.

A graph says itself what such an operator is, by a function of the operators that it stands for, so a runtime without it
computes what it did before. On GPUs our own kernels have it (`hosts/kernels/cuda`).
"""

from __future__ import annotations

import onnx_ir as ir

from mirror.bundle import GATED
from mirror.export.graphs import is_op, replace
from mirror.export.lower import ORT
from mirror.export.trace import DOMAIN, OPSET

VERSION = 1
# The products that may be gated, with how many inputs they have.
_INPUTS = {"FusedMatMul": 2, "MatMulNBits": 3}


def name_gated_products(model: ir.Model) -> None:
    """Turn each gated product of a lowered graph in float16 into one node of a function of the model."""
    for node in list(model.graph):
        found = _gated(node)
        if found is None:
            continue
        product, between = found
        # A function takes what its product takes: rows and the matrix, and the same numbers.
        attributes = list(product.attributes.values())
        gated = ir.Node(DOMAIN, f"{GATED}{product.op_type}", product.inputs, attributes)
        gated.outputs[0].type, gated.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
        model.graph.insert_before(node, gated)
        replace(model.graph, node, gated.outputs[0])
        model.graph.remove([*between, product], safe=True)
        _declare(model, product)


def _gated(node: ir.Node) -> tuple[ir.Node, list[ir.Node]] | None:
    """Return the product whose halves `node` gates, and the nodes between the two; None if it doesn't gate one."""
    if not is_op(node, "Mul") or node.outputs[0].dtype is not ir.DataType.FLOAT16:
        return None
    for opened, up in (node.inputs, node.inputs[::-1]):
        split = up.producer() if up is not None else None
        silu = opened.producer() if opened is not None else None
        if split is None or silu is None or not _halves(split):
            continue
        gate, product = split.outputs[0], split.inputs[0].producer() if split.inputs[0] is not None else None
        sigmoid = _silu_of(silu, gate)
        if product is None or sigmoid is None or up is not split.outputs[1] or not _is_ours(product):
            continue
        between = [silu, sigmoid, split]
        values = [output for part in (*between, product) for output in part.outputs]
        inside = {node, *between}
        uses = [use.node for value in values for use in value.uses()]
        if inside.issuperset(uses) and not any(value.is_graph_output() for value in values):
            return product, between
    return None


def _halves(node: ir.Node) -> bool:
    """Whether a node splits something in two equal parts along its last axis."""
    if not is_op(node, "Split") or len(node.outputs) != 2 or node.attributes["axis"].as_int() != -1:
        return False
    sizes = node.inputs[1].const_value if len(node.inputs) > 1 and node.inputs[1] is not None else None
    return "num_outputs" in node.attributes if sizes is None else len(set(sizes.numpy().tolist())) == 1


def _silu_of(node: ir.Node, gate: ir.Value) -> ir.Node | None:
    """Return the Sigmoid of `gate * sigmoid(gate)`, None if a node isn't that product."""
    if not is_op(node, "Mul") or gate not in node.inputs:
        return None
    other = node.inputs[1] if node.inputs[0] is gate else node.inputs[0]
    sigmoid = other.producer() if other is not None else None
    return sigmoid if sigmoid is not None and is_op(sigmoid, "Sigmoid") and sigmoid.inputs[0] is gate else None


def _is_ours(product: ir.Node) -> bool:
    """Whether a node is a product of one of the known kinds, without a bias."""
    return product.domain == ORT and len(product.inputs) == _INPUTS.get(product.op_type, 0)


def _declare(model: ir.Model, product: ir.Node) -> None:
    """Give a model the function that says what a gated product of this kind is."""
    name = f"{GATED}{product.op_type}"
    if any(key[:2] == (DOMAIN, name) for key in model.functions):
        return
    inputs = [ir.Value(name=f"input_{index}") for index in range(len(product.inputs))]
    given = [ir.RefAttr(key, key, attribute.type) for key, attribute in product.attributes.items()]
    whole = ir.Node(ORT, product.op_type, inputs, given, version=VERSION)
    split = ir.node("Split", whole.outputs, {"axis": -1, "num_outputs": 2}, num_outputs=2)
    gate, up = split.outputs
    sigmoid = ir.node("Sigmoid", [gate])
    silu = ir.node("Mul", [gate, sigmoid.outputs[0]])
    gated = ir.node("Mul", [silu.outputs[0], up])
    opsets = {"": OPSET, ORT: 1}
    graph = ir.Graph(inputs, gated.outputs, nodes=[whole, split, sigmoid, silu, gated], opset_imports=opsets)
    declared = [ir.Attr(key, attribute.type, None) for key, attribute in product.attributes.items()]
    function = ir.Function(DOMAIN, name, graph=graph, attributes=declared)
    model.functions[function.identifier()] = function
    model.graph.opset_imports[DOMAIN] = VERSION
