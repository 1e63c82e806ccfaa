"""The real CPU device with a hook before every pass, and with fixed widths if wanted."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from mirror.bundle import Form
from mirror.targets.base import Tensor
from mirror.targets.cpu import CpuDevice
from mirror.targets.onnxruntime_session import OnnxRuntimeDevice, Provider
from mirror.targets.static_shapes import widths_of
from mirror.targets.watched import Pass, WatchedDevice

# Gets the segment's name and the pass's feeds; may wait or raise.
Hook = Callable[[str, Mapping[str, Tensor]], None]


def no_hook(name: str, feeds: Mapping[str, Tensor]) -> None:
    """Do nothing."""


class HookedDevice(WatchedDevice):
    """The CPU, hooked. With `static`, segments take only the widths that they were loaded with."""

    def __init__(self, hook: Hook = no_hook, *, static: bool = False, form: Form = Form.INPLACE) -> None:
        picky = OnnxRuntimeDevice("cpu", Provider("CPUExecutionProvider", fixed_widths=True), form)
        super().__init__(picky if static else CpuDevice(form), self._hooked)
        self._hook = hook

    def _hooked(self, item: Pass) -> Mapping[str, Tensor]:
        _check(item)
        self._hook(item.segment, item.feeds)
        return item.run()


def _check(item: Pass) -> None:
    """Fail where a pass has a width that wasn't announced, or rows that the cache has no slots for."""
    positions, request = item.feeds["position_ids"], item.request
    assert isinstance(positions, np.ndarray)
    width = positions.shape[1]
    loaded = item.inner.widths is None or width in widths_of((*request.shapes, *request.later))
    assert loaded, "a width it was not loaded for"
    assert item.cache is None or item.past_length + width <= item.cache.capacity, "rows past the cache"
