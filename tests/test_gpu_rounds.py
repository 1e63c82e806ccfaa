"""What the GPU's own record of its kernels says about overlap."""

from __future__ import annotations

from mirror.bench.gpu_rounds import merge, overlap, streams_of


def _kernel(stream: int, start_us: float, duration_us: float, cat: str = "kernel") -> dict[str, object]:
    return {"cat": cat, "ts": start_us, "dur": duration_us, "args": {"stream": stream}}


def test_intervals_that_touch_or_contain_each_other_become_one() -> None:
    assert merge([(5, 6), (0, 2), (1, 3), (3, 4), (0, 1)]) == [(0, 4), (5, 6)]


def test_the_busiest_stream_is_the_targets_and_only_common_time_counts() -> None:
    events = [
        _kernel(7, 0, 100),
        _kernel(9, 50, 20),
        _kernel(9, 60, 60),
        _kernel(9, 200, 10),
        _kernel(1, 0, 5, "cpu_op"),
    ]
    found = overlap(streams_of(events))
    assert found == {"target_busy_ms": 0.1, "draft_busy_ms": 0.08, "both_busy_ms": 0.05, "span_ms": 0.21}


def test_work_one_after_the_other_does_not_overlap() -> None:
    found = overlap(streams_of([_kernel(1, 0, 10), _kernel(2, 10, 4), _kernel(1, 14, 10)]))
    assert found["both_busy_ms"] == 0.0
