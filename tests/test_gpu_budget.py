"""Where a round's time goes: every moment has one term, and work is where the devices say it was."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mirror.bench.gpu_budget import OTHER, by_devices, common, where_time_goes, without
from mirror.bench.gpu_clock import PassClock, Ran
from mirror.bundle import read_manifest
from mirror.runtime.feeds import FeedPool
from mirror.runtime.records import Lane, Mode, Round, Span
from mirror.targets.base import LoadRequest, PassShape
from mirror.targets.cpu import CpuDevice
from tests.test_gpu_rounds import bundle as bundle  # a fixture

MS = 1e-3


def span(name: str, lane: Lane, start: float, end: float) -> Span:
    return Span(name, lane, start * MS, end * MS)


def ran(lane: Lane, segment: str, start: float, end: float) -> Ran:
    return Ran(lane, segment, start * MS, end * MS)


# The host launches the prefix and waits inside "suffix"; the GPU's own times lie elsewhere.
ROUND = Round(
    Mode.MIRROR, 7, 2, 3, True, 64, 0.0, 16 * MS,
    (
        span("prefix", Lane.TARGET, 0, 0.2), span("suffix", Lane.TARGET, 0.3, 12), span("verify", Lane.TARGET, 12, 13),
        span("rollout_wait", Lane.TARGET, 13, 15), span("trunk", Lane.DRAFT, 0.1, 2),
        span("rollout", Lane.DRAFT, 8, 15),
    ),
)  # fmt: skip
RAN = (
    ran(Lane.TARGET, "target_prefix", 0.5, 7), ran(Lane.TARGET, "exit_head", 7, 8),
    ran(Lane.TARGET, "target_suffix", 8, 11.5),
    ran(Lane.DRAFT, "draft_trunk", 0.2, 1.9), ran(Lane.DRAFT, "draft", 8, 10), ran(Lane.DRAFT, "draft", 10.5, 14.5),
)  # fmt: skip


def test_the_terms_sum_to_the_round() -> None:
    found = where_time_goes([ROUND, ROUND], RAN)
    expected = {
        "prefix": 6.5, "exit_head": 1, "suffix": 3.5, "verify": 1, "rollout_wait": 2, "redraft": 0, OTHER: 2,
        "draft_prefill_wait": 0, "round": 16, "draft": 7.7, "draft_hidden": (1.4 + 2 + 1) / 7.7,
    }  # fmt: skip
    assert found == pytest.approx(expected)
    assert sum(part for name, part in found.items() if not name.startswith("draft_h")) == pytest.approx(16 * 2 + 7.7)


def test_a_trace_shows_the_devices_times_and_waits_only_while_the_target_stands_still() -> None:
    (drawn,) = by_devices([ROUND], RAN)
    spans = {(item.name, round(item.start_s / MS, 3), round(item.end_s / MS, 3)) for item in drawn.spans}
    assert spans == {
        ("prefix", 0.5, 7), ("exit_head", 7, 8), ("suffix", 8, 11.5), ("trunk", 0.2, 1.9), ("rollout", 8, 10),
        ("rollout", 10.5, 14.5), ("rollout_wait", 13, 15),
    }  # fmt: skip
    late = (*RAN[:2], ran(Lane.TARGET, "target_suffix", 8, 14))
    (drawn,) = by_devices([ROUND], late)
    waits = [(item.start_s / MS, item.end_s / MS) for item in drawn.spans if item.name == "rollout_wait"]
    assert waits == [pytest.approx((14, 15))]


def test_unions_are_cut_where_they_meet() -> None:
    assert common([(0, 4), (6, 9)], [(3, 7), (8, 20)]) == [(3, 4), (6, 7), (8, 9)]
    assert without([(0, 4), (6, 9)], [(3, 7), (8, 20)]) == [(0, 3), (7, 8)]
    assert without([(0, 4)], [(1, 2), (2.5, 3)]) == [(0, 1), (2, 2.5), (3, 4)]


def test_a_clock_notes_passes_between_start_and_take(bundle: Path) -> None:
    manifest, clock = read_manifest(bundle), PassClock()
    device = clock.watched(CpuDevice(), Lane.DRAFT)
    segment = manifest.segments["target_prefix"]
    loaded = device.load_segment(LoadRequest(bundle, segment, [PassShape(4)], 64, 1))
    cache, feeds = device.make_cache(segment.kv, 64), FeedPool(64, manifest.model.max_positions).at(4)
    feeds.fill_causal(np.arange(4), 0)
    for noted in (False, True):
        if noted:
            clock.start()
        loaded.run(feeds.tensors, cache, 0)
    (one,) = clock.take()
    assert (one.lane, one.segment) == (Lane.DRAFT, "target_prefix")
    assert one.end_s > one.start_s
    loaded.run(feeds.tensors, cache, 0)
    assert clock.take() == (one,)


class FakeCuda:
    """Events that note a made-up time, in ms, which goes on by one at each record."""

    def __init__(self) -> None:
        self.now = 0.0
        self.Event = lambda enable_timing: FakeEvent(self)
        self.ExternalStream = lambda handle, device: handle

    def synchronize(self, device: str) -> None:
        """Nothing is under way."""

    def current_stream(self, device: str) -> int:
        return 0


class FakeEvent:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.at, self.stream = cuda, -1.0, 0

    def record(self, stream: int = 0) -> None:
        self.cuda.now += 1
        self.at, self.stream = self.cuda.now, stream

    def synchronize(self) -> None:
        """It has happened."""

    def elapsed_time(self, other: FakeEvent) -> float:
        assert other.stream == 77, "the passes' events are on the device's own stream"
        return other.at - self.at


class OnStream(CpuDevice):
    """A CPU that claims to launch on a stream."""

    stream = SimpleNamespace(handle=77)


def test_passes_on_a_gpu_are_timed_by_events_on_its_stream(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()
    monkeypatch.setattr("mirror.bench.gpu_clock._cuda", lambda: cuda)
    manifest, clock = read_manifest(bundle), PassClock()
    device = clock.watched(OnStream(), Lane.TARGET)
    segment = manifest.segments["target_prefix"]
    loaded = device.load_segment(LoadRequest(bundle, segment, [PassShape(4)], 64, 1))
    cache, feeds = device.make_cache(segment.kv, 64), FeedPool(64, manifest.model.max_positions).at(4)
    feeds.fill_causal(np.arange(4), 0)
    loaded.run(feeds.tensors, cache, 0)
    assert cuda.now == 0  # nothing is recorded before the clock starts
    before_s = time.perf_counter()
    clock.start()
    after_s = time.perf_counter()
    for _ in range(2):
        loaded.run(feeds.tensors, cache, 0)
    first, second = clock.take()
    assert (first.end_s - first.start_s, second.start_s - first.start_s) == pytest.approx((MS, 2 * MS))
    assert before_s <= first.start_s - MS <= after_s  # joined to the host's clock at the zero before it
