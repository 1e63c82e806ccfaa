"""A timeline of an answer as Chrome trace events, for Perfetto or chrome://tracing. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mirror.runtime.records import Lane, Round, Span

_LANE_ROWS = {Lane.HOST: 0, Lane.TARGET: 1, Lane.DRAFT: 2}


def chrome_trace(prefill_spans: Sequence[Span], rounds: Sequence[Round], devices: Mapping[Lane, str]) -> dict[str, Any]:
    """Return a trace: one row for the rounds and one per device, times in microseconds from the first.

    Args:
        devices: the device's name of each lane, for the rows' titles.
    """
    starts = [span.start_s for span in prefill_spans] + [item.start_s for item in rounds]
    starts += [span.start_s for item in rounds for span in item.spans]
    origin_s = min(starts, default=0.0)
    events = [_row_name(lane, devices.get(lane)) for lane in Lane]
    events += [_span_event(span, origin_s) for span in prefill_spans]
    for index, item in enumerate(rounds):
        events.append(_round_event(index, item, origin_s))
        events += [_span_event(span, origin_s) for span in item.spans]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _row_name(lane: Lane, device: str | None) -> dict[str, Any]:
    title = "rounds" if lane is Lane.HOST else f"{lane.value} on {device or 'no device'}"
    return {"ph": "M", "name": "thread_name", "pid": 1, "tid": _LANE_ROWS[lane], "args": {"name": title}}


def _span_event(span: Span, origin_s: float) -> dict[str, Any]:
    return _complete(span.name, _LANE_ROWS[span.lane], span.start_s - origin_s, span.seconds, {})


def _round_event(index: int, item: Round, origin_s: float) -> dict[str, Any]:
    facts = {
        "mode": item.mode.value,
        "proposed": item.proposed,
        "accepted": item.accepted,
        "committed": item.committed,
        "reused": item.reused,
        "branches": item.branches,
    }
    row = _LANE_ROWS[Lane.HOST]
    return _complete(f"round {index}", row, item.start_s - origin_s, item.end_s - item.start_s, facts)


def _complete(name: str, row: int, start_s: float, seconds: float, facts: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "X", "name": name, "pid": 1, "tid": row, "ts": 1e6 * start_s, "dur": 1e6 * seconds, "args": facts}
