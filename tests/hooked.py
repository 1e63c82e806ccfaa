"""The real CPU device with a hook before every pass, and with fixed widths if wanted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from mirror.bundle import Form, LayerKV, Segment
from mirror.targets.base import KVCache, LoadedSegment, PassShape, Tensor
from mirror.targets.cpu import CpuDevice
from mirror.targets.static_shapes import widths_of

# Gets the segment's name and the pass's feeds; may wait or raise.
Hook = Callable[[str, Mapping[str, Tensor]], None]


def no_hook(name: str, feeds: Mapping[str, Tensor]) -> None:
    """Do nothing."""


class HookedSegment:
    """A loaded segment that calls a hook before each pass, inside its `run`."""

    def __init__(
        self, name: str, inner: LoadedSegment, hook: Hook, widths: tuple[int, ...] | None, later: tuple[int, ...]
    ) -> None:
        self._name = name
        self._inner = inner
        self._hook = hook
        self._widths = widths
        self._later = later

    @property
    def widths(self) -> tuple[int, ...] | None:
        return self._widths

    @property
    def input_names(self) -> frozenset[str]:
        return self._inner.input_names

    def run(self, feeds: Mapping[str, Tensor], cache: KVCache | None, past_length: int) -> Mapping[str, Tensor]:
        positions = feeds["position_ids"]
        assert isinstance(positions, np.ndarray)
        loaded = self._widths is None or positions.shape[1] in (*self._widths, *self._later)
        assert loaded, "a width it was not loaded for"
        assert cache is None or past_length + positions.shape[1] <= cache.capacity, "rows past the cache"
        self._hook(self._name, feeds)
        return self._inner.run(feeds, cache, past_length)


class HookedDevice:
    """The CPU, hooked. With `static`, segments take only the widths that they were loaded with."""

    def __init__(self, hook: Hook = no_hook, *, static: bool = False, form: Form = Form.INPLACE) -> None:
        self._inner = CpuDevice(form)
        self._hook = hook
        self._static = static

    @property
    def name(self) -> str:
        return "cpu"

    @property
    def form(self) -> Form:
        return self._inner.form

    def load_segment(
        self,
        folder: Path,
        segment: Segment,
        *,
        capacity: int,
        shapes: Sequence[PassShape],
        threads: int,
        later: Sequence[PassShape] = (),
    ) -> HookedSegment:
        inner = self._inner.load_segment(
            folder, segment, capacity=capacity, shapes=shapes, threads=threads, later=later
        )
        return HookedSegment(
            segment.name, inner, self._hook, widths_of(shapes) if self._static else None, widths_of(later)
        )

    def make_cache(self, layers: Sequence[LayerKV], capacity: int) -> KVCache:
        return self._inner.make_cache(layers, capacity)
