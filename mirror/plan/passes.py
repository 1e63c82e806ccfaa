"""How long a pass takes alone, and what of its device it occupies meanwhile. Pure."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass

from mirror.errors import RequestError
from mirror.plan.box import Box, DeviceProfile
from mirror.plan.work import ModelWork, SegmentWork


@dataclass(frozen=True)
class PassSize:
    """Rows of a pass, how many of them want logits, and the tokens before it."""

    rows: int
    logit_rows: int
    context: int


@dataclass(frozen=True)
class PassTime:
    """The time of one pass alone, ms, by what it is spent on.

    Attributes:
        dispatch_ms: starting the pass and its kernels.
        weights_ms, cache_ms: reading matrices, and the cache.
        arithmetic_ms: multiplying, which goes on while memory is read.
        copy_ms: the cache's way to the device.
        use: the share of each memory's bandwidth, and of the device itself, that the pass takes up while it runs.
    """

    name: str
    dispatch_ms: float
    weights_ms: float
    cache_ms: float
    arithmetic_ms: float
    copy_ms: float
    use: Mapping[str, float]

    @property
    def busy_ms(self) -> float:
        """How long the device is at work: dispatch, then memory or arithmetic, whichever takes longer."""
        return self.dispatch_ms + max(self.weights_ms + self.cache_ms, self.arithmetic_ms)

    @property
    def ms(self) -> float:
        """The whole pass: the cache's way, then the device's work."""
        return self.copy_ms + self.busy_ms

    @property
    def bound(self) -> str:
        """What takes the most of it."""
        read_ms = self.weights_ms + self.cache_ms
        parts = {
            "dispatch": self.dispatch_ms,
            "bandwidth": self.weights_ms,
            "attention over the cache": self.cache_ms,
            "arithmetic": self.arithmetic_ms if self.arithmetic_ms > read_ms else 0.0,
            "moving the cache": self.copy_ms,
        }
        return max(parts, key=lambda name: parts[name])


@dataclass(frozen=True, eq=False)
class Part:
    """A model on a device. Equal only to itself, so that times can be kept by it."""

    model: ModelWork
    device: DeviceProfile
    box: Box
    draft: bool

    def time(self, segment: SegmentWork, size: PassSize) -> PassTime:
        """Return the time of one pass of a segment.

        Raises:
            RequestError: the profile has no rate for the way in which matrices are stored.
        """
        device, work = self.device, segment.body + segment.head
        weights_ms = _ms(work.matrix_bytes, device.product_gb_s(segment.precision)) * _many_rows(device, size.rows)
        cache_ms = _ms(work.slot_bytes * size.context, (device.cache_gb_s or device.gb_s).value)
        copied = work.slot_bytes * self.model.capacity_slots
        timed = PassTime(
            segment.name,
            device.pass_ms.value + work.kernels * device.kernel_us.value / 1e3,
            weights_ms,
            cache_ms,
            multiply_adds(segment, size) * 2e-9 / rate_tops(device, segment.precision),
            _ms(copied, device.copy_gb_s.value) if device.copy_gb_s else 0.0,
            {},
        )
        moved_gb = (work.matrix_bytes + work.slot_bytes * size.context) / 1e9
        share = 1e3 * moved_gb / timed.ms / self.box.memories[device.memory].value
        taken = device.draft_use.value if device.draft_use and self.draft else 1.0
        use = {device.memory: min(share, 1.0), f"device {device.name}": taken * timed.busy_ms / timed.ms}
        return dataclasses.replace(timed, use=use)


@functools.lru_cache(maxsize=2**14)
def whole_time(part: Part, name: str, size: PassSize) -> PassTime:
    """Return the time of a pass through a whole model; a search asks for the same ones again and again."""
    return part.time(part.model.whole(name), size)


def multiply_adds(segment: SegmentWork, size: PassSize) -> float:
    """Return the multiply-adds of a pass."""
    rows = size.rows * (segment.body.matrices + segment.body.attention * size.context)
    return rows + size.logit_rows * segment.head.matrices


def rate_tops(device: DeviceProfile, precision: str) -> float:
    """Return a device's sustained rate for matrices that are stored in some way.

    Raises:
        RequestError: the profile has none.
    """
    if precision not in device.tops:
        raise RequestError(
            f"{device.name} ({device.title}) has no rate for {precision}, only for {', '.join(device.tops)}; plan with "
            "one of these, or add tops to the profile"
        )
    return device.tops[precision].value


def _ms(size_bytes: float, gb_s: float) -> float:
    return size_bytes / gb_s / 1e6


def _many_rows(device: DeviceProfile, rows: int) -> float:
    return device.many_rows.value if device.many_rows and rows > 1 else 1.0
