"""Counts what a graph's file holds, without a library that knows ONNX and without the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mirror.bundle import product_kind
from mirror.errors import BundleError
from mirror.runtime.wire import messages, numbers
from mirror.targets.base import StoredWeights

# Field numbers of ONNX's protocol buffers.
_MODEL_GRAPH, _GRAPH_NODE, _GRAPH_INITIALIZER = 7, 1, 5
_NODE_INPUT, _NODE_OUTPUT, _NODE_KIND, _NODE_ATTRIBUTE = 1, 2, 4, 5
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME = 1, 2, 8
_ATTRIBUTE_NAME, _ATTRIBUTE_INT = 1, 3
_TENSOR_RAW, _TENSOR_EXTERNAL, _KEY, _VALUE = 9, 13, 1, 2
_PRODUCTS = ("FusedMatMul", "MatMul", "Gemm", "MatMulNBits", "DynamicQuantizeMatMul")
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
    outputs: tuple[str, ...]
    numbers: Mapping[str, int]


def count_graph(path: Path) -> GraphCount:
    """Return the counts of an ONNX file.

    Raises:
        BundleError: it isn't there.
    """
    _, nodes, found = _parsed(path)
    products = tuple(product for product in found if product is not None)
    starts = [node.kind not in _VIEWS for node in nodes]
    end = max((place for place, product in enumerate(found) if product is not None), default=len(nodes) - 1)
    heads = sum(node.numbers.get("num_heads", 0) for node in nodes if node.kind == "GroupQueryAttention")
    return GraphCount(products, sum(starts), heads, sum(starts[end + 1 :]))


def stored_weights(path: Path) -> StoredWeights:
    """Return what an ONNX file says of its weights.

    Raises:
        BundleError: it isn't there.
    """
    tensors, _, found = _parsed(path)
    products = [product for product in found if product is not None]
    quantized = [product for product in products if product.precision.startswith("int")]
    floats = [product for product in products if not product.precision.startswith("int")]
    return StoredWeights(
        bytes=sum(map(tensor_bytes, tensors.values())),
        matrix_numbers=sum(product.matrices for product in floats),
        matrix_bytes=sum(product.bytes for product in floats),
        quantized_bytes=sum(product.bytes for product in quantized),
    )


# --- nodes and tensors ----------------------------------------------------------------------------


def _parsed(path: Path) -> tuple[Mapping[str, memoryview], Sequence[_Node], Sequence[Product | None]]:
    """Return a file's initializers by name, its nodes in the order in which they run, and the product of each."""
    if not path.is_file():
        raise BundleError(f"{path.name} is missing from {path.parent}; export the bundle again")
    graph = next(messages(memoryview(path.read_bytes()), _MODEL_GRAPH))
    tensors = {_text(tensor, _TENSOR_NAME): tensor for tensor in messages(graph, _GRAPH_INITIALIZER)}
    nodes = [_node(data) for data in messages(graph, _GRAPH_NODE)]
    # The rows form turns matrices on their way into a product.
    turns = (node for node in nodes if node.kind == "Transpose" and node.inputs[0] in tensors)
    read = tensors | {node.outputs[0]: tensors[node.inputs[0]] for node in turns}
    return tensors, nodes, [_product(node, read) for node in nodes]


def _node(data: memoryview) -> _Node:
    attributes = {
        _text(item, _ATTRIBUTE_NAME): next(numbers(item, _ATTRIBUTE_INT), None)
        for item in messages(data, _NODE_ATTRIBUTE)
    }
    inputs, outputs = (
        tuple(str(item, "utf-8") for item in messages(data, field)) for field in (_NODE_INPUT, _NODE_OUTPUT)
    )
    known = {name: value for name, value in attributes.items() if value is not None}
    return _Node(_text(data, _NODE_KIND), inputs, outputs, known)


def _product(node: _Node, tensors: Mapping[str, memoryview]) -> Product | None:
    """Return the product that a node computes with stored numbers, None if it computes none."""
    kind = product_kind(node.kind)
    if kind not in _PRODUCTS:
        return None
    stored = [tensors[name] for name in node.inputs if name in tensors]
    if kind == "MatMulNBits":
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


def tensor_bytes(tensor: memoryview) -> int:
    """Return the bytes of one initializer: inside the file, or where its `length` entry says how many."""
    inside = sum(len(raw) for raw in messages(tensor, _TENSOR_RAW))
    for entry in messages(tensor, _TENSOR_EXTERNAL):
        if bytes(next(messages(entry, _KEY), b"")) == b"length":
            return inside + int(bytes(next(messages(entry, _VALUE))))
    return inside
