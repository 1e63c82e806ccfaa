"""A device whose passes go through a callable: to time them, to keep what they are fed, to hold them up or break them.

The watch stands around each pass, so it can act before, after and instead of it. Nothing else is changed: names,
forms, widths and caches are the inner device's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mirror.bundle import Form, LayerKV, Segment
from mirror.targets.base import Device, KVCache, LoadedSegment, LoadRequest, PassShape, RowTable, StoredWeights, Tensor


@dataclass(frozen=True)
class Pass:
    """One pass that is about to run.

    Attributes:
        request: what its segment was loaded for.
        inner: the segment that runs it.
        feeds, cache, past_length: as `base.LoadedSegment.run` gets them.
    """

    request: LoadRequest
    inner: LoadedSegment
    feeds: Mapping[str, Tensor]
    cache: KVCache | None
    past_length: int

    @property
    def segment(self) -> str:
        """The segment's name."""
        return self.request.segment.name

    def run(self) -> Mapping[str, Tensor]:
        """Run it and return its outputs."""
        return self.inner.run(self.feeds, self.cache, self.past_length)


Watch = Callable[[Pass], Mapping[str, Tensor]]


@dataclass(frozen=True)
class WatchedSegment:
    """A loaded segment whose passes go through a watch."""

    request: LoadRequest
    inner: LoadedSegment
    watch: Watch

    @property
    def widths(self) -> tuple[int, ...] | None:
        """The inner segment's."""
        return self.inner.widths

    @property
    def input_names(self) -> frozenset[str]:
        """The inner segment's."""
        return self.inner.input_names

    def run(self, feeds: Mapping[str, Tensor], cache: KVCache | None, past_length: int) -> Mapping[str, Tensor]:
        """Let the watch run one pass; see `base.LoadedSegment.run`."""
        return self.watch(Pass(self.request, self.inner, feeds, cache, past_length))


class OuterDevice:
    """A device in front of another one. Subclass it to do something at a load."""

    def __init__(self, inner: Device) -> None:
        self._inner = inner

    @property
    def name(self) -> str:
        """The inner device's."""
        return self._inner.name

    @property
    def form(self) -> Form:
        """The inner device's."""
        return self._inner.form

    @property
    def int8_drafts(self) -> bool:
        """The inner device's."""
        return self._inner.int8_drafts

    @property
    def padded_width(self) -> int:
        """The inner device's."""
        return self._inner.padded_width

    def weight_bytes(self, segment: Segment, stored: StoredWeights, shapes: Sequence[PassShape]) -> int:
        """The inner device's."""
        return self._inner.weight_bytes(segment, stored, shapes)

    def load_segment(self, request: LoadRequest) -> LoadedSegment:
        """Load a segment on the inner device."""
        return self._inner.load_segment(request)

    def make_cache(self, layers: Sequence[LayerKV], capacity: int) -> KVCache:
        """Return the inner device's cache."""
        return self._inner.make_cache(layers, capacity)

    @property
    def launches(self) -> bool:
        """Whether the inner device does."""
        return self._inner.launches

    def make_table(self, rows: int, columns: int) -> RowTable:
        """Return the inner device's table."""
        return self._inner.make_table(rows, columns)


class WatchedDevice(OuterDevice):
    """A device whose segments' passes go through a watch."""

    def __init__(self, inner: Device, watch: Watch) -> None:
        super().__init__(inner)
        self._watch = watch

    def load_segment(self, request: LoadRequest) -> WatchedSegment:
        """Load a segment on the inner device."""
        return WatchedSegment(request, self._inner.load_segment(request), self._watch)
