"""How many branches a rollout has time for, learnt from when the last ones ended. Pure."""

from __future__ import annotations

import math

_LEAST = 8  # branches that are worth a rollout's while
# A rollout is late that ends so much of its own time after the outcome is known, and early as much before.
_LATE, _EARLY = 0.03, 0.1
_FEWER, _MORE = 0.9, 1.03


class BranchPace:
    """The share of a rollout's branches that take part in its passes, so that it ends about when the target does.

    A late rollout keeps the target waiting, which costs more than its last branches are worth; an early one might have
    prepared more. Passes 0, 1, ... take the share to the power of 1, 2, ..., since later tokens of unlikely branches
    count least.
    """

    def __init__(self, branches: int) -> None:
        """Begin with all of at most so many branches."""
        self._share = 1.0
        self._least = min(1.0, _LEAST / max(branches, 1))

    def first(self, branches: int) -> int:
        """Return how many of some branches the first pass takes."""
        return self.later(1, branches)

    def later(self, number: int, branches: int) -> int:
        """Return how many of the first pass's branches take part in pass `number`, from 0."""
        return max(1, math.ceil(branches * self._share**number - 1e-9))

    def note(self, late_s: float, spent_s: float) -> None:
        """Note that a rollout which took `spent_s` ended so long after its outcome was known, or before if negative."""
        if late_s > _LATE * spent_s:
            self._share = max(self._least, self._share * _FEWER)
        elif late_s < -_EARLY * spent_s:
            self._share = min(1.0, self._share * _MORE)
