"""Name the products of a graph that our kernels for GPUs have: gated, and with small matrices normed or float16 ones.

A gated product is `silu(gate(x)) * up(x)`, gate and up one matrix; a normed one is of `norm(x + skip)`, and gives that
sum too. A graph says itself what such an operator is, by a function of the operators that it stands for, so a runtime
without it computes what it did before. On GPUs our own kernels have it (`hosts/kernels/cuda`).
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
import onnx_ir.convenience as ir_convenience

from mirror.bundle import GATED, NORMED, SMALL
from mirror.export.graphs import is_op, replace, sizes
from mirror.export.lower import ORT
from mirror.export.trace import DOMAIN, OPSET

VERSION = 1
# Up to so many numbers a matrix is small: our kernel takes less time for it than a library's, made for large ones, and
# each part of it computes a norm in front of it in less time than a kernel of its own.
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
    for node in list(model.graph):
        norm = _norm_of(node)
        if norm is not None:
            _name_normed(model, norm, node)


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
    turned = {name for name in _TURNS if name in node.attributes and node.attributes[name].as_int()}
    return turned == {"transB"} and _fits({attribute.name: attribute for attribute in _sizes(node)})


def _fits(attributes: Mapping[str, ir.Attr]) -> bool:
    """Whether the matrix that attributes tell of is small."""
    counts = [attributes[name].as_int() for name in ("N", "K") if name in attributes]
    return len(counts) == 2 and counts[0] * counts[1] <= SMALL_MATRIX


def _norm_of(node: ir.Node) -> ir.Node | None:
    """Return the norm that a product with a small matrix alone reads, None where there is none."""
    named = node.domain == DOMAIN and node.op_type.removeprefix(GATED).removeprefix(SMALL) in _INPUTS
    if not (named or _is_ours(node)) or not _fits(node.attributes):
        return None
    rows = node.inputs[0]
    norm = rows.producer() if rows is not None else None
    if norm is None or not is_op(norm, "SkipSimplifiedLayerNormalization", ORT) or len(norm.inputs) != 3:
        return None
    others = [value for value in norm.outputs[1:3] if value.uses() or value.is_graph_output()]
    normed = norm.outputs[0]
    single = len(normed.uses()) == 1 and not normed.is_graph_output() and len(norm.outputs) == 4
    return norm if single and not others and normed.dtype is ir.DataType.FLOAT16 else None


def _name_normed(model: ir.Model, norm: ir.Node, product: ir.Node) -> None:
    """Put one node of a function in place of a norm and the product that reads it."""
    inputs = [*norm.inputs, *product.inputs[1:]]
    attributes = [*norm.attributes.values(), *product.attributes.values()]
    named = ir.Node(DOMAIN, f"{NORMED}{product.op_type}", inputs, attributes, num_outputs=2)
    for new, old in zip(named.outputs, (product.outputs[0], norm.outputs[3]), strict=True):
        new.type, new.shape = old.type, old.shape
    _declare_normed(model, norm, product, named)
    model.graph.insert_before(norm, named)
    replace(model.graph, product, named.outputs[0])
    added = norm.outputs[3]
    if added.is_graph_output():
        name = added.name
        added.name = f"{name}_replaced"
        named.outputs[1].name = name
    ir_convenience.replace_all_uses_with(added, named.outputs[1], replace_graph_outputs=True)
    model.graph.remove(norm, safe=True)


def _declare_normed(model: ir.Model, norm: ir.Node, product: ir.Node, named: ir.Node) -> None:
    """Give a model the function that says what a normed product of this kind is."""
    if any(key[:2] == (DOMAIN, named.op_type) for key in model.functions):
        return
    inputs = [ir.Value(name=f"input_{index}") for index in range(len(named.inputs))]
    first = ir.Node(ORT, norm.op_type, inputs[:3], _passed_on(norm), num_outputs=4, version=VERSION)
    rows = [first.outputs[0], *inputs[3:]]
    kind = product.op_type.removeprefix(GATED).removeprefix(SMALL)
    given = [attribute for attribute in _passed_on(product) if kind != _HALF or attribute.name not in ("N", "K")]
    whole = ir.Node(ORT, kind, rows, given, version=VERSION)
    nodes = [first, whole, *(_gate(whole.outputs[0]) if product.op_type.startswith(GATED) else [])]
    outputs = [nodes[-1].outputs[0], first.outputs[3]]
    _add_function(model, named, ir.Graph(inputs, outputs, nodes=nodes, opset_imports={"": OPSET, ORT: 1}))


def _passed_on(node: ir.Node) -> list[ir.Attr]:
    """Return the attributes of a node inside a function that is given them under the same names."""
    return [ir.RefAttr(key, key, attribute.type) for key, attribute in node.attributes.items()]


def _add_function(model: ir.Model, named: ir.Node, body: ir.Graph) -> None:
    """Declare what a named node stands for."""
    declared = [ir.Attr(key, attribute.type, None) for key, attribute in named.attributes.items()]
    function = ir.Function(DOMAIN, named.op_type, graph=body, attributes=declared)
    model.functions[function.identifier()] = function
    model.graph.opset_imports[DOMAIN] = VERSION


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
    whole = ir.Node(ORT, product.op_type, inputs, _passed_on(product), version=VERSION)
    nodes = [whole, *(_gate(whole.outputs[0]) if named.op_type.startswith(GATED) else [])]
    _add_function(model, named, ir.Graph(inputs, nodes[-1].outputs, nodes=nodes, opset_imports={"": OPSET, ORT: 1}))


def _gate(both: ir.Value) -> list[ir.Node]:
    """Return the nodes that let one half of a product gate the other."""
    split = ir.node("Split", [both], {"axis": -1, "num_outputs": 2}, num_outputs=2)
    gate, up = split.outputs
    sigmoid = ir.node("Sigmoid", [gate])
    silu = ir.node("Mul", [gate, sigmoid.outputs[0]])
    return [split, sigmoid, silu, ir.node("Mul", [silu.outputs[0], up])]
