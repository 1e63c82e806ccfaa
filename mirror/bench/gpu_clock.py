"""When passes ran, by the clock of the device that ran them.

A pass on a GPU is only launched when `run` returns, so the host's clock says nothing about it: events on its
stream do, one before and one after, and one zero that joins the GPU's time to the host's. On a CPU a pass has
ended when `run` returns, and the host's clock is the device's.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mirror.runtime.records import Lane
from mirror.targets.base import Device, Tensor
from mirror.targets.watched import Pass, Watch, WatchedDevice


@dataclass(frozen=True)
class Ran:
    """One pass of a segment, in seconds of the host's `perf_counter`; waiting for earlier work is left out."""

    lane: Lane
    segment: str
    start_s: float
    end_s: float


class PassClock:
    """Notes the passes of watched devices between `start` and `take`."""

    def __init__(self) -> None:
        self._on = False
        self._ran: list[Ran] = []
        self._launched: list[tuple[Lane, str, str, Any, Any]] = []  # on a GPU: its name, events before and after
        self._zeros: dict[str, tuple[Any, float]] = {}  # by GPU: an event, and its time on the host's clock
        self._gpus: set[str] = set()

    def watched(self, device: Device, lane: Lane) -> Device:
        """Return a device whose passes are noted; a GPU's by events on its stream."""
        stream = getattr(device, "stream", None)
        if stream is None:
            return WatchedDevice(device, self._host_watch(lane))
        self._gpus.add(device.name)
        return WatchedDevice(device, self._gpu_watch(lane, device.name, stream.handle))

    def start(self) -> None:
        """Forget what was noted, and note from now on."""
        self._ran.clear()
        self._launched.clear()
        for gpu in self._gpus:
            self._set_zero(gpu)
        self._on = True

    def take(self) -> tuple[Ran, ...]:
        """Stop, wait for the GPU, and return the passes by their start."""
        self._on = False
        found = list(self._ran)
        if self._launched:
            for gpu in self._gpus:
                _cuda().synchronize(gpu)
            found += [
                Ran(lane, name, self._at(gpu, begin), self._at(gpu, end))
                for lane, name, gpu, begin, end in self._launched
            ]
        return tuple(sorted(found, key=lambda item: item.start_s))

    def _at(self, gpu: str, event: Any) -> float:
        """Return an event's time in seconds of the host's clock."""
        zero, zero_s = self._zeros[gpu]
        return zero_s + float(zero.elapsed_time(event)) / 1e3

    def _set_zero(self, gpu: str) -> None:
        _cuda().synchronize(gpu)
        zero = _cuda().Event(enable_timing=True)
        stream = _cuda().current_stream(gpu)
        before_s = time.perf_counter()
        zero.record(stream)
        zero.synchronize()
        # The GPU passed the event at some time between; a few microseconds apart.
        self._zeros[gpu] = zero, (before_s + time.perf_counter()) / 2

    def _host_watch(self, lane: Lane) -> Watch:
        def watch(item: Pass) -> Mapping[str, Tensor]:
            start_s = time.perf_counter()
            outputs = item.run()
            if self._on:
                self._ran.append(Ran(lane, item.segment, start_s, time.perf_counter()))
            return outputs

        return watch

    def _gpu_watch(self, lane: Lane, gpu: str, handle: int) -> Watch:
        cuda = _cuda()
        stream = cuda.ExternalStream(handle, device=gpu)

        def watch(item: Pass) -> Mapping[str, Tensor]:
            if not self._on:
                return item.run()
            begin, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
            begin.record(stream)
            outputs = item.run()
            end.record(stream)
            self._launched.append((lane, item.segment, gpu, begin, end))
            return outputs

        return watch


def _cuda() -> Any:
    """Return torch's CUDA module, which has events and takes streams of others."""
    import torch

    return torch.cuda
