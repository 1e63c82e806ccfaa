"""What a bundle is, in the words of its manifest: segments, sizes, the cut, the devices they suit.

Reads `mirror.json` alone, so it needs neither a runtime nor the weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mirror.bundle import Form, LayerKV, Manifest, Segment, read_manifest

# A graph keeps its cache in place, which ONNX Runtime's own devices do, or hands its rows to the host.
DEVICES_OF_FORM = {Form.INPLACE: ("cpu", "cuda"), Form.ROWS: ("openvino:CPU", "openvino:GPU", "openvino:NPU")}
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "uint8": 1}


@dataclass(frozen=True)
class SegmentSummary:
    """One segment: its graphs' own size, without the weights that segments share."""

    name: str
    layers: int
    forms: tuple[str, ...]
    graph_bytes: int
    kv_bytes: int
    devices: tuple[str, ...]


@dataclass(frozen=True)
class BundleSummary:
    """A bundle in a few lines. `kv_bytes` is for a cache of `max_length` slots."""

    path: str
    architecture: str
    model_type: str
    source: str
    precision: str
    layers: int
    exit_layer: int
    hidden_size: int
    vocab_size: int
    gamma: int
    kappa: int
    max_length: int
    draft: str | None
    total_bytes: int
    schema_version: int
    made_by: str
    segments: tuple[SegmentSummary, ...]


def summarize(folder: Path) -> BundleSummary:
    """Return the summary of a bundle folder.

    Raises:
        BundleError: the folder isn't a bundle, or its manifest can't be read.
    """
    manifest = read_manifest(folder)
    model, decoding = manifest.model, manifest.decoding
    return BundleSummary(
        path=str(folder),
        architecture=model.architecture,
        model_type=model.model_type,
        source=manifest.producer.source,
        precision=model.precision,
        layers=model.layers,
        exit_layer=decoding.exit_layer,
        hidden_size=model.hidden_size,
        vocab_size=model.vocab_size,
        gamma=decoding.gamma,
        kappa=decoding.kappa,
        max_length=decoding.max_length,
        draft=_draft(manifest),
        total_bytes=sum(facts.bytes for facts in manifest.files.values()),
        schema_version=manifest.schema_version,
        made_by=f"mirror {manifest.producer.version}",
        segments=tuple(_segment(manifest, segment) for segment in manifest.segments.values()),
    )


def _draft(manifest: Manifest) -> str | None:
    draft = manifest.draft
    if draft is None:
        return None
    if draft.kind == "ngram":
        return "ngram (prompt lookup, no model)"
    return f"{draft.source} ({draft.layers} layers)"


def _segment(manifest: Manifest, segment: Segment) -> SegmentSummary:
    return SegmentSummary(
        name=segment.name,
        layers=len(segment.kv),
        forms=tuple(form.value for form in segment.graphs),
        graph_bytes=sum(_file_bytes(manifest, graph.file) for graph in segment.graphs.values()),
        kv_bytes=_kv_bytes(segment.kv, manifest.decoding.max_length),
        devices=tuple(device for form in segment.graphs for device in DEVICES_OF_FORM[form]),
    )


def _file_bytes(manifest: Manifest, name: str) -> int:
    facts = manifest.files.get(name)
    return 0 if facts is None else facts.bytes


def _kv_bytes(layers: Iterable[LayerKV], slots: int) -> int:
    return sum(2 * layer.heads * layer.head_dim * slots * ITEM_BYTES.get(layer.dtype, 4) for layer in layers)
