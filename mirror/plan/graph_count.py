"""A bundle's work, counted from its graph files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mirror.bundle import INT8_SEGMENTS, Form, LayerKV, Manifest, Segment
from mirror.errors import RequestError
from mirror.plan.work import ModelWork, Work
from mirror.runtime.graph_count import GraphCount, Product, count_graph
from mirror.runtime.memory import slot_bytes


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


def count_draft(folder: Path, manifest: Manifest, device: str) -> ModelWork | None:
    """Return the work of a bundle's draft on a device, by its name; None where it is no model."""
    # As in `runtime/loading.py`: drafts on `cpu` have graphs of their own, if the bundle has them.
    integers = manifest.segments.get(INT8_SEGMENTS["draft"]) if device == "cpu" else None
    segment = integers or manifest.segments.get("draft")
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
