"""Name the products of a graph that our own kernels for GPUs have: gated ones and, in float16, small ones.

A gated product is `silu(gate(x)) * up(x)`, gate and up one matrix. A graph says itself what such an operator is, by a
function of the operators that it stands for, so a runtime without it computes what it did before. On GPUs our own
kernels have it (`hosts/kernels/cuda`).
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from mirror.bundle import GATED, SMALL
from mirror.export.graphs import is_op, replace, sizes
from mirror.export.lower import ORT
from mirror.export.trace import DOMAIN, OPSET

VERSION = 1
# Up to so many numbers a matrix in float16 is small: our kernel takes less time for it than a library's, made for
# large ones.
SMALL_MATRIX = 2**23
_HALF = "FusedMatMul"
_TURNS = ("transA", "transB", "transBatchA", "transBatchB")
# The products that may be named, with how many inputs they have.
_INPUTS = {_HALF: 2, "MatMulNBits": 3}


def name_products(model: ir.Model) -> None:
    """Turn each product of a lowered graph that our kernels have into one node of a function of the model."""
    for node in list(model.graph):
        found = _gated(node)
        if found is not None:
            product, between = found
            _name(model, node, product, between, GATED)
    for node in list(model.graph):
        if _is_small(node):
            _name(model, node, node, [], SMALL)


def _name(model: ir.Model, node: ir.Node, product: ir.Node, between: list[ir.Node], prefix: str) -> None:
    """Put one node of a function in place of `node`, which `between` leads to from a product."""
    # A function takes what its product takes: rows and the matrix, and the same numbers.
    attributes = list(product.attributes.values())
    if product.op_type == _HALF:
        attributes += _sizes(product)
    named = ir.Node(DOMAIN, f"{prefix}{product.op_type}", product.inputs, attributes)
    named.outputs[0].type, named.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
    _declare(model, product, named)
    model.graph.insert_before(node, named)
    replace(model.graph, node, named.outputs[0])
    if between:
        model.graph.remove([*between, product], safe=True)


def _is_small(node: ir.Node) -> bool:
    """Whether a node multiplies rows with a small matrix in float16, which has a row for each output."""
    if not _is_ours(node) or node.op_type != _HALF or node.outputs[0].dtype is not ir.DataType.FLOAT16:
        return False
    counts = [attribute.as_int() for attribute in _sizes(node)]
    turned = {name for name in _TURNS if name in node.attributes and node.attributes[name].as_int()}
    return turned == {"transB"} and len(counts) == 2 and counts[0] * counts[1] <= SMALL_MATRIX


def _sizes(product: ir.Node) -> list[ir.Attr]:
    """Return the outputs and inputs of a stored matrix with a row for each output, as MatMulNBits says them."""
    matrix = product.inputs[1]
    if matrix is None or not matrix.is_initializer() or matrix.shape is None or len(matrix.shape) != 2:
        return []
    outputs, inputs = sizes(matrix)
    return [ir.AttrInt64("N", outputs), ir.AttrInt64("K", inputs)]


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


def _declare(model: ir.Model, product: ir.Node, named: ir.Node) -> None:
    """Give a model the function that says what a named product of this kind is."""
    if any(key[:2] == (DOMAIN, named.op_type) for key in model.functions):
        return
    inputs = [ir.Value(name=f"input_{index}") for index in range(len(product.inputs))]
    given = [ir.RefAttr(key, key, attribute.type) for key, attribute in product.attributes.items()]
    whole = ir.Node(ORT, product.op_type, inputs, given, version=VERSION)
    nodes = [whole, *(_gate(whole.outputs[0]) if named.op_type.startswith(GATED) else [])]
    declare(model, named, inputs, nodes)


def declare(model: ir.Model, named: ir.Node, inputs: Sequence[ir.Value], nodes: Sequence[ir.Node]) -> None:
    """Give a model the function that a node is named after: what nodes make of inputs, the last one's output."""
    graph = ir.Graph(inputs, nodes[-1].outputs, nodes=nodes, opset_imports={"": OPSET, ORT: 1})
    attributes = [ir.Attr(key, attribute.type, None) for key, attribute in named.attributes.items()]
    function = ir.Function(DOMAIN, named.op_type, graph=graph, attributes=attributes)
    model.functions[function.identifier()] = function
    model.graph.opset_imports[DOMAIN] = VERSION


def _gate(both: ir.Value) -> list[ir.Node]:
    """Return the nodes that let one half of a product gate the other."""
    split = ir.node("Split", [both], {"axis": -1, "num_outputs": 2}, num_outputs=2)
    gate, up = split.outputs
    sigmoid = ir.node("Sigmoid", [gate])
    silu = ir.node("Mul", [gate, sigmoid.outputs[0]])
    return [split, sigmoid, silu, ir.node("Mul", [silu.outputs[0], up])]
