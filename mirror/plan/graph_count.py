"""Counts a bundle's work from its graph files, without a library that knows ONNX and without the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mirror.bundle import Form, LayerKV, Manifest, Segment
from mirror.errors import BundleError, RequestError
from mirror.plan.work import ModelWork, Work
from mirror.runtime.memory import slot_bytes, tensor_bytes
from mirror.runtime.wire import messages, numbers

# Field numbers of ONNX's protocol buffers.
_MODEL_GRAPH, _GRAPH_NODE, _GRAPH_INITIALIZER = 7, 1, 5
_NODE_INPUT, _NODE_KIND, _NODE_ATTRIBUTE, _TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME = 1, 4, 5, 1, 2, 8
_ATTRIBUTE_NAME, _ATTRIBUTE_INT = 1, 3
_PRODUCTS = ("FusedMatMul", "MatMul", "Gemm", "MatMulNBits")
# Operators that only look at a tensor in another way, or fold away once sizes are fixed.
_VIEWS = ("Reshape", "Unsqueeze", "Squeeze", "Identity", "Constant", "Shape")
_TYPES = {1: "fp32", 10: "fp16", 16: "bf16", 2: "int8", 3: "int8"}


@dataclass(frozen=True)
class Product:
    """One product with a stored matrix: its numbers, the bytes it takes, and how it is stored."""

    matrices: int
    bytes: int
    precision: str


@dataclass(frozen=True)
class GraphCount:
    """What a graph holds.

    Attributes:
        products: in the order in which they run.
        kernels: nodes that a device starts.
        last: those of them that follow the last product.
        query_heads: of its attention, all layers together; 0 where the form doesn't say.
    """

    products: tuple[Product, ...]
    kernels: int
    query_heads: int
    last: int = 0


@dataclass(frozen=True)
class _Node:
    kind: str
    inputs: tuple[str, ...]
    numbers: Mapping[str, int]


def count_graph(path: Path) -> GraphCount:
    """Return the counts of an ONNX file.

    Raises:
        BundleError: it isn't there.
    """
    if not path.is_file():
        raise BundleError(f"{path.name} is missing from {path.parent}; export the bundle again")
    graph = next(messages(memoryview(path.read_bytes()), _MODEL_GRAPH))
    tensors = {_text(tensor, _TENSOR_NAME): tensor for tensor in messages(graph, _GRAPH_INITIALIZER)}
    nodes = [_node(data) for data in messages(graph, _GRAPH_NODE)]
    found = [_product(node, tensors) for node in nodes]
    products = tuple(product for product in found if product is not None)
    starts = [node.kind not in _VIEWS for node in nodes]
    end = max((place for place, product in enumerate(found) if product is not None), default=len(nodes) - 1)
    heads = sum(node.numbers.get("num_heads", 0) for node in nodes if node.kind == "GroupQueryAttention")
    return GraphCount(products, sum(starts), heads, sum(starts[end + 1 :]))


def count_target(folder: Path, manifest: Manifest) -> ModelWork:
    """Return the work of a bundle's target, its layers taken as equal.

    Raises:
        BundleError: a graph is missing.
        RequestError: no matrix is stored in it.
    """
    prefix, suffix = (_counted(folder, manifest.segments[name]) for name in ("target_prefix", "target_suffix"))
    exit_head = _counted(folder, manifest.segments["exit_head"])
    layers, cut = manifest.model.layers, manifest.decoding.exit_layer
    # The choice of a token belongs to the head.
    head = _head(suffix) + Work(kernels=suffix.last)
    layer = (_body(prefix, prefix.products) + _body(suffix, suffix.products[:-1], suffix.last)).times(1 / layers)
    kv = [*manifest.segments["target_prefix"].kv, *manifest.segments["target_suffix"].kv]
    return ModelWork(
        name=f"{manifest.model.architecture}, {layers} layers, cut after {cut}",
        precision=_precision(prefix, suffix),
        layers=layers,
        layer=layer + _attention(prefix.query_heads + suffix.query_heads, kv).times(1 / layers),
        head=head,
        exit_head=_products(exit_head.products) + Work(kernels=exit_head.kernels),
        capacity_slots=manifest.decoding.max_length + manifest.decoding.gamma + 1,
    )


def count_draft(folder: Path, manifest: Manifest) -> ModelWork | None:
    """Return the work of a bundle's draft; None where it is no model."""
    segment = manifest.segments.get("draft")
    if manifest.draft is None or segment is None:
        return None
    count = _counted(folder, segment)
    layers = manifest.draft.layers
    layer = _body(count, count.products[:-1]) + _attention(count.query_heads, segment.kv)
    return ModelWork(
        name=f"the draft from {manifest.draft.source}",
        precision=_precision(count),
        layers=layers,
        layer=layer.times(1 / layers),
        head=_head(count),
        exit_head=Work(),
        capacity_slots=manifest.decoding.max_length + manifest.decoding.gamma + 1,
    )


def _counted(folder: Path, segment: Segment) -> GraphCount:
    graph = segment.graphs.get(Form.INPLACE) or next(iter(segment.graphs.values()))
    return count_graph(folder / graph.file)


def _body(count: GraphCount, products: tuple[Product, ...], left_out: int = 0) -> Work:
    return _products(products) + Work(kernels=count.kernels - left_out)


def _head(count: GraphCount) -> Work:
    """Return the last product of a segment that gives logits or tokens: its LM head."""
    return _products(count.products[-1:])


def _products(products: tuple[Product, ...]) -> Work:
    return Work(sum(item.matrices for item in products), sum(item.bytes for item in products))


def _attention(query_heads: int, kv: Sequence[LayerKV]) -> Work:
    """Return what attention reads and multiplies for each token of the context: scores, and their mean of values."""
    width = sum(layer.head_dim for layer in kv) / max(len(kv), 1)
    heads = query_heads or sum(layer.heads for layer in kv)
    return Work(slot_bytes=slot_bytes(kv), attention=2 * heads * width)


def _precision(*counts: GraphCount) -> str:
    """Return how most of the matrices are stored."""
    found: dict[str, int] = {}
    for product in (product for count in counts for product in count.products):
        found[product.precision] = found.get(product.precision, 0) + product.matrices
    if not found:
        raise RequestError("the bundle's graphs hold no matrix to count; plan with --target-shape")
    return max(found, key=lambda name: found[name])


# --- nodes and tensors ----------------------------------------------------------------------------


def _node(data: memoryview) -> _Node:
    attributes = {
        _text(item, _ATTRIBUTE_NAME): next(numbers(item, _ATTRIBUTE_INT), None)
        for item in messages(data, _NODE_ATTRIBUTE)
    }
    inputs = tuple(str(item, "utf-8") for item in messages(data, _NODE_INPUT))
    known = {name: value for name, value in attributes.items() if value is not None}
    return _Node(_text(data, _NODE_KIND), inputs, known)


def _product(node: _Node, tensors: Mapping[str, memoryview]) -> Product | None:
    """Return the product that a node computes with stored numbers, None if it computes none."""
    if node.kind not in _PRODUCTS:
        return None
    stored = [tensors[name] for name in node.inputs if name in tensors]
    if node.kind == "MatMulNBits":
        size, bits = node.numbers["N"] * node.numbers["K"], node.numbers.get("bits", 4)
        return Product(size, sum(map(tensor_bytes, stored)), f"int{bits}")
    matrices = [tensor for tensor in stored if len(list(numbers(tensor, _TENSOR_DIMS))) > 1]
    if not matrices:
        return None
    dtype = next(numbers(matrices[0], _TENSOR_TYPE), 1)
    return Product(sum(map(_size, matrices)), sum(map(tensor_bytes, matrices)), _TYPES.get(dtype, "fp32"))


def _size(tensor: memoryview) -> int:
    size = 1
    for dimension in numbers(tensor, _TENSOR_DIMS):
        size *= dimension
    return size


def _text(data: memoryview, number: int) -> str:
    return str(next(messages(data, number), memoryview(b"")), "utf-8")
