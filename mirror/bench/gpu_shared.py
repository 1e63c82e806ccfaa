"""A target that several engines use, one after the other: a big model's weights are brought to the GPU once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mirror.bundle import LayerKV
from mirror.targets.base import Device, KVCache, LoadedSegment, LoadRequest
from mirror.targets.static_shapes import widths_of
from mirror.targets.watched import OuterDevice


class SharedDevice(OuterDevice):
    """A device that keeps the segments and caches it has made and hands them out again.

    With the same caches the segments' recorded passes serve every engine. Only one engine may answer at a time, and
    each answer must begin with its whole prompt: what a cache holds from before belongs to another engine.
    """

    def __init__(self, inner: Device) -> None:
        super().__init__(inner)
        self._kept: dict[tuple[Path, str, tuple[int, ...], int], LoadedSegment] = {}
        self._caches: dict[tuple[tuple[LayerKV, ...], int], KVCache] = {}

    def load_segment(self, request: LoadRequest) -> LoadedSegment:
        """Return the segment that was loaded for the same widths and slots, or load it."""
        key = request.folder, request.segment.name, widths_of(request.shapes), request.capacity
        if key not in self._kept:
            self._kept[key] = self._inner.load_segment(request)
        return self._kept[key]

    def make_cache(self, layers: Sequence[LayerKV], capacity: int) -> KVCache:
        """Return the cache that was made for the same layers and slots, or make it."""
        key = tuple(layers), capacity
        if key not in self._caches:
            self._caches[key] = self._inner.make_cache(layers, capacity)
        return self._caches[key]
