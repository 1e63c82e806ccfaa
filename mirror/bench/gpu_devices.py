"""Devices for benchmarks: as users name them, and OpenVINO's plugin where OpenVINO itself is installed too."""

from __future__ import annotations

from mirror.bench.gpu_clock import PassClock
from mirror.runtime.records import Lane
from mirror.targets import open_device
from mirror.targets.base import Device

PLUGIN_PREFIX = "plugin:"


def open_watched(name: str, clock: PassClock, lane: Lane) -> Device:
    """Return a device whose passes a clock notes; `plugin:CPU` is OpenVINO's plugin for ONNX Runtime.

    Raises:
        DeviceError: it isn't there.
    """
    return clock.watched(_open(name, background=lane is Lane.DRAFT), lane)


def _open(name: str, *, background: bool) -> Device:
    if not name.startswith(PLUGIN_PREFIX):
        return open_device(name, background=background)
    from mirror.targets.openvino_plugin import open_plugin_device

    return open_plugin_device(name.removeprefix(PLUGIN_PREFIX), None)
