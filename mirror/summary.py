"""What a bundle is: segments, sizes, the cut, the devices they suit, the memory they take.

Reads `mirror.json` and the graphs' own files, so it needs neither a runtime library nor the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mirror.bundle import INT8_SEGMENTS, Form, Manifest, Segment, read_manifest

# A graph keeps its cache in place, which ONNX Runtime's own devices do, or hands its rows to the host.
DEVICES_OF_FORM = {
    Form.INPLACE: ("cpu", "cuda"),
    Form.ROWS: ("openvino:CPU", "openvino:GPU", "openvino:NPU", "qnn:htp"),
}


@dataclass(frozen=True)
class SegmentSummary:
    """One segment.

    Attributes:
        weight_bytes: what its weights take where it is loaded; on disk segments share some.
        kv_bytes: its cache, a target's of `max_length` slots, a draft's of what it reads; `slot_bytes` is one slot.
    """

    name: str
    layers: int
    forms: tuple[str, ...]
    weight_bytes: int
    slot_bytes: int
    kv_bytes: int
    devices: tuple[str, ...]


@dataclass(frozen=True)
class Memory:
    """What loading takes, in bytes: weights, and a cache that grows with the capacity. Activations come on top."""

    weight_bytes: int
    slot_bytes: int
    max_length: int

    @property
    def bytes(self) -> int:
        """At the bundle's full capacity."""
        return self.weight_bytes + self.slot_bytes * self.max_length


def memory_of(segments: Sequence[SegmentSummary], max_length: int) -> Memory:
    """Return what some segments take together; the draft's graphs share one cache.

    Those for GPUs or CPUs alone are left out: what is loaded is checked by itself.
    """
    everywhere = [segment for segment in segments if segment.name not in ("draft_sampled", *INT8_SEGMENTS.values())]
    slots = sum(segment.slot_bytes for segment in everywhere if segment.name != "draft_trunk")
    return Memory(sum(segment.weight_bytes for segment in everywhere), slots, max_length)


@dataclass(frozen=True)
class BundleSummary:
    """A bundle in a few lines. `kv_bytes` is for a target's cache of `max_length` slots, a draft's of what it reads."""

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
    settings: str | None
    total_bytes: int
    schema_version: int
    made_by: str
    segments: tuple[SegmentSummary, ...]
    target_memory: Memory
    draft_memory: Memory | None


def summarize(folder: Path) -> BundleSummary:
    """Return the summary of a bundle folder.

    Raises:
        BundleError: the folder isn't a bundle, or its manifest can't be read.
    """
    manifest = read_manifest(folder)
    model, decoding = manifest.model, manifest.decoding
    segments = tuple(_segment(folder, manifest, segment) for segment in manifest.segments.values())
    drafts = [segment for segment in segments if segment.name.startswith("draft")]
    targets = [segment for segment in segments if segment not in drafts]
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
        settings=_settings(manifest),
        total_bytes=sum(facts.bytes for facts in manifest.files.values()),
        schema_version=manifest.schema_version,
        made_by=f"mirror {manifest.producer.version}",
        segments=segments,
        target_memory=memory_of(targets, decoding.max_length),
        draft_memory=memory_of(drafts, manifest.draft_capacity) if drafts else None,
    )


def _draft(manifest: Manifest) -> str | None:
    draft = manifest.draft
    if draft is None:
        return None
    if draft.kind == "ngram":
        return "ngram (prompt lookup, no model)"
    return f"{draft.source} ({draft.layers} layers)"


def _settings(manifest: Manifest) -> str | None:
    """Return what a host does where the user says nothing, in words; None where the bundle leaves all to it."""
    told = {
        name: ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        for name, value in vars(manifest.settings).items()
        if value is not None
    }
    return ", ".join(f"{name} {value}" for name, value in told.items()) or None


def _segment(folder: Path, manifest: Manifest, segment: Segment) -> SegmentSummary:
    from mirror.runtime.memory import segment_memory, slot_bytes

    slots = manifest.draft_capacity if segment.name.startswith("draft") else manifest.decoding.max_length
    form = Form.INPLACE if Form.INPLACE in segment.graphs else Form.ROWS
    memory = segment_memory(folder, segment, form, slots)
    return SegmentSummary(
        name=segment.name,
        layers=len(segment.kv),
        forms=tuple(form.value for form in segment.graphs),
        weight_bytes=memory.weight_bytes,
        slot_bytes=slot_bytes(segment.kv),
        kv_bytes=memory.cache_bytes,
        devices=_devices(manifest, segment),
    )


def _devices(manifest: Manifest, segment: Segment) -> tuple[str, ...]:
    """Return the devices that run a segment's graphs."""
    if segment.name in INT8_SEGMENTS.values():
        return ("cpu",)
    devices = (device for form in segment.graphs for device in DEVICES_OF_FORM[form])
    has_other = INT8_SEGMENTS.get(segment.name) in manifest.segments
    return tuple(device for device in devices if not (has_other and device == "cpu"))
