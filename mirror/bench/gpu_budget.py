"""Where the time of a round goes, by what the devices did. Pure.

Every moment of a round belongs to one term: the target's device runs one of its segments, or it stands still, and
then the host is waiting for the draft, choosing tokens, or doing something else. So the terms sum to the round.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from mirror.bench.gpu_clock import Ran
from mirror.runtime.records import Lane, Round, Span

Interval = tuple[float, float]

TARGET_SPANS = {"target_prefix": "prefix", "exit_head": "exit_head", "target_suffix": "suffix"}
WAITS = ("rollout_wait", "redraft", "draft_prefill_wait")
_HOST_WORK = "verify"
OTHER = "launching and the rest"
_DRAFT_WORK = ("trunk", "rollout", "propose", "draft_prefill")


def merge(intervals: Iterable[Interval]) -> list[Interval]:
    """Return the union of some intervals, ascending and apart."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def length(intervals: Iterable[Interval]) -> float:
    """Return the time that intervals apart from each other cover."""
    return sum(end - start for start, end in intervals)


def common(first: Sequence[Interval], second: Sequence[Interval]) -> list[Interval]:
    """Return the time in both of two unions."""
    found = [(max(a, c), min(b, d)) for a, b in first for c, d in second]
    return [(start, end) for start, end in found if end > start]


def without(first: Sequence[Interval], second: Sequence[Interval]) -> list[Interval]:
    """Return the time of one union that is not in another."""
    left: list[Interval] = []
    for start, end in first:
        for begin, stop in common([(start, end)], second):
            if begin > start:
                left.append((start, begin))
            start = stop
        if end > start:
            left.append((start, end))
    return left


def where_time_goes(rounds: Sequence[Round], ran: Sequence[Ran]) -> dict[str, float]:
    """Return the mean ms of each term of a round, of the whole round (`round`), and of the draft beside it.

    `draft` is the draft's device at work; `draft_hidden` is the share of it during which the target's device
    was at work too.
    """
    totals: dict[str, float] = {}
    for item in rounds:
        for name, seconds in _terms(item, ran).items():
            totals[name] = totals.get(name, 0.0) + seconds
    means = {name: 1e3 * seconds / len(rounds) for name, seconds in totals.items()}
    both = means.pop("both", 0.0)
    return {**means, "draft_hidden": both / means["draft"]} if means.get("draft") else means


def _terms(item: Round, ran: Sequence[Ran]) -> dict[str, float]:
    whole = [(item.start_s, item.end_s)]
    target = {name: common(whole, _of(ran, Lane.TARGET, segment)) for segment, name in TARGET_SPANS.items()}
    busy = merge(part for parts in target.values() for part in parts)
    draft = common(whole, merge((one.start_s, one.end_s) for one in ran if one.lane is Lane.DRAFT))
    idle = without(whole, busy)
    terms = {name: length(parts) for name, parts in target.items()}
    for name in (*WAITS, _HOST_WORK):
        spans = merge((span.start_s, span.end_s) for span in item.spans if span.name == name)
        terms[name] = length(common(idle, spans))
        idle = without(idle, spans)
    terms[OTHER] = length(idle)
    terms["round"] = item.end_s - item.start_s
    return {**terms, "draft": length(draft), "both": length(common(draft, busy))}


def _of(ran: Sequence[Ran], lane: Lane, segment: str) -> list[Interval]:
    return merge((one.start_s, one.end_s) for one in ran if one.lane is lane and one.segment == segment)


def by_devices(rounds: Sequence[Round], ran: Sequence[Ran]) -> list[Round]:
    """Return rounds whose spans of work are what the devices say; waits are kept where the target stands still."""
    return [dataclasses.replace(item, spans=tuple(_spans(item, ran))) for item in rounds]


def _spans(item: Round, ran: Sequence[Ran]) -> Iterable[Span]:
    """Yield a round's spans. A draft's pass is named after the work that the host says it belonged to."""
    whole = [(item.start_s, item.end_s)]
    target = merge((one.start_s, one.end_s) for one in ran if one.lane is Lane.TARGET)
    works = [span for span in item.spans if span.lane is Lane.DRAFT and span.name in _DRAFT_WORK]
    for one in ran:
        middle = (one.start_s + one.end_s) / 2
        if one.lane is Lane.TARGET and item.start_s <= middle <= item.end_s:
            yield Span(TARGET_SPANS[one.segment], one.lane, one.start_s, one.end_s)
        if one.lane is Lane.DRAFT:
            for span in works:
                if span.start_s <= middle <= span.end_s:
                    yield Span(span.name, one.lane, one.start_s, one.end_s)
    for span in item.spans:
        if span.name in WAITS:
            for start, end in without(common(whole, [(span.start_s, span.end_s)]), target):
                yield Span(span.name, span.lane, start, end)
