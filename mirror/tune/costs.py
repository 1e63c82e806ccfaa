"""How long a round takes, from the measured time of single passes. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mirror.runtime.candidates import CandidateSource
from mirror.runtime.lookahead import BranchPass, branch_passes

_OFTEN = 5


@dataclass(frozen=True)
class PassCosts:
    """The time of a segment's pass by its width, ms.

    Attributes:
        points: by segment, (width, ms) pairs, ascending.
        host_ms: what a round takes beside its passes.
    """

    points: Mapping[str, tuple[tuple[int, float], ...]]
    host_ms: float

    def ms(self, segment: str, width: float) -> float:
        """Return the time of one pass: between measured widths on a line, beyond the last one on the same line."""
        points = self.points[segment]
        widths, times = zip(*points, strict=True)
        if width <= widths[-1] or len(points) == 1:
            return float(np.interp(width, widths, times))
        (before, low), (last, high) = points[-2], points[-1]
        return high + max(high - low, 0.0) / (last - before) * (width - last)

    def target_ms(self, width: int) -> float:
        """Return the time of prefix and suffix together."""
        return self.ms("target_prefix", width) + self.ms("target_suffix", width)

    def cut_at(self, share: float) -> PassCosts:
        """Return the same costs with another share of the target's time in the prefix."""
        widths = [width for width, _ in self.points["target_prefix"]]
        whole = {width: self.target_ms(width) for width in widths}
        prefix = tuple((width, share * whole[width]) for width in widths)
        suffix = tuple((width, (1.0 - share) * whole[width]) for width in widths)
        return PassCosts({**self.points, "target_prefix": prefix, "target_suffix": suffix}, self.host_ms)


def pass_costs(seconds: Mapping[tuple[str, int], Sequence[float]], host_ms: float) -> PassCosts:
    """Return the median time of each segment at each width, of those alone that were seen often if some were.

    A device plans or records a shape in its first passes, so a width that was seen once or twice tells nothing.
    """
    often = {segment for (segment, _), times in seconds.items() if len(times) >= _OFTEN}
    points: dict[str, list[tuple[int, float]]] = {}
    for (segment, width), times in sorted(seconds.items()):
        if len(times) >= _OFTEN or segment not in often:
            points.setdefault(segment, []).append((width, 1e3 * statistics.median(times)))
    return PassCosts({segment: tuple(items) for segment, items in points.items()}, host_ms)


@dataclass(frozen=True)
class RoundShares:
    """What a round needs of chance.

    Attributes:
        prepared: the share of rounds whose outcome has a branch.
        committed: mean tokens of a round.
    """

    prepared: float
    committed: float


def mirror_ms(
    costs: PassCosts,
    gamma: int,
    branches: int,
    tokens_per_pass: Sequence[int],
    source: CandidateSource,
    shares: RoundShares,
    proposal_tokens_per_pass: Sequence[int],
) -> float:
    """Return the mean time of an overlapped round.

    The rollout starts when its candidates are there and runs beside the suffix. What is left of it when the
    outcome is known goes on for one branch, and the target waits; without a branch it drafts anew.
    """
    width = gamma + 1
    ready = costs.ms("draft_trunk", width)
    target_end = costs.target_ms(width)
    if source.needs_exit:
        offered = costs.ms("target_prefix", width) + costs.ms("exit_head", width)
        ready, target_end = max(ready, offered), target_end + costs.ms("exit_head", width)
    clock, passes = ready, branch_passes(tokens_per_pass, gamma)
    while passes and clock < target_end:
        clock += _pass_ms(costs, passes[0], branches)
        passes = passes[1:]
    rest = sum(_pass_ms(costs, item, 1) for item in passes)
    waiting = max(clock - target_end, 0.0) + shares.prepared * rest
    redraft = (1.0 - shares.prepared) * propose_ms(costs, gamma, proposal_tokens_per_pass, 1)
    return target_end + waiting + redraft + costs.host_ms


def serial_ms(costs: PassCosts, gamma: int, tokens_per_pass: Sequence[int], committed: float) -> float:
    """Return the mean time of a round that drafts, then verifies."""
    reading = max(round(committed), 1)
    return costs.target_ms(gamma + 1) + propose_ms(costs, gamma, tokens_per_pass, reading) + costs.host_ms


def propose_ms(costs: PassCosts, gamma: int, tokens_per_pass: Sequence[int], reading: int) -> float:
    """Return the time of drafting gamma tokens one after the other, the first pass reading some rows more."""
    return sum(_pass_ms(costs, item, 1) for item in branch_passes(tokens_per_pass, gamma, reading))


def _pass_ms(costs: PassCosts, item: BranchPass, branches: int) -> float:
    return costs.ms("draft", branches * item.rows)
