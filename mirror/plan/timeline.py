"""Target and draft at work at once: when each pass ends, while they share a memory, or even one device. Pure.

Passes are taken as even streams. Where two of them want more of something than there is, it is split evenly, and
what one doesn't want is the other's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mirror.plan.passes import PassTime


@dataclass(frozen=True)
class Overlap:
    """When the passes of both lanes ended, ms; passes of the draft that never began are left out."""

    target_ends: tuple[float, ...]
    draft_ends: tuple[float, ...]

    @property
    def target_ms(self) -> float:
        """When the target was done."""
        return self.target_ends[-1]

    @property
    def draft_ms(self) -> float:
        """When the last pass that the draft began was done."""
        return self.draft_ends[-1] if self.draft_ends else 0.0


def run_beside(target: Sequence[PassTime], draft: Sequence[PassTime], gate: int) -> Overlap:
    """Return how a round goes.

    Args:
        target: its passes, one after the other.
        draft: its passes; the first starts at once.
        gate: how many of the target's passes must be done before the draft's second begins.

    A draft's pass that hasn't begun when the target is done doesn't begin: by then the outcome is known.
    """
    clock = 0.0
    ends: tuple[list[float], list[float]] = ([], [])
    left = [1.0, 1.0]  # of the pass that each lane runs
    while len(ends[0]) < len(target) or left[1] < 1.0:
        running = (
            target[len(ends[0])] if len(ends[0]) < len(target) else None,
            _drafting(draft, len(ends[1]), begun=left[1] < 1.0, ready=gate <= len(ends[0])),
        )
        speeds = shared_speeds(running[0], running[1])
        times = [left[lane] * item.ms / speeds[lane] for lane, item in enumerate(running) if item is not None]
        step = min(times)
        clock += step
        for lane, item in enumerate(running):
            if item is None:
                continue
            left[lane] -= step * speeds[lane] / item.ms if item.ms > 0 else left[lane]
            if left[lane] <= 1e-12:
                ends[lane].append(clock)
                left[lane] = 1.0
    return Overlap(tuple(ends[0]), tuple(ends[1]))


def _drafting(draft: Sequence[PassTime], done: int, *, begun: bool, ready: bool) -> PassTime | None:
    if done >= len(draft):
        return None
    return draft[done] if begun or ready or done == 0 else None


def shared_speeds(first: PassTime | None, second: PassTime | None) -> tuple[float, float]:
    """Return at what share of their own speed two passes run beside each other."""
    if first is None or second is None:
        return 1.0, 1.0
    speeds = [1.0, 1.0]
    for name, wanted in first.use.items():
        given = split(wanted, second.use.get(name, 0.0))
        for lane, (got, want) in enumerate(zip(given, (wanted, second.use.get(name, 0.0)), strict=True)):
            speeds[lane] = min(speeds[lane], got / want if want > 0 else 1.0)
    return speeds[0], speeds[1]


def split(first: float, second: float) -> tuple[float, float]:
    """Return what each gets of a whole of 1: all that it wants, or half of it, or what the other leaves."""
    if first + second <= 1.0:
        return first, second
    if first <= 0.5:
        return first, 1.0 - first
    return (1.0 - second, second) if second <= 0.5 else (0.5, 0.5)
