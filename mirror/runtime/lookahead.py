"""How many passes a continuation takes, and how large they are. Pure integers.

A pass gives each branch `1 + streams` tokens: the one after its last real row, and one for each stream
row that follows it. The next pass feeds them all as real rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class BranchPass:
    """One pass, per branch.

    Attributes:
        real: rows of tokens that the cache doesn't hold yet.
        gives: tokens that come out; `gives - 1` stream rows follow the real ones.
    """

    real: int
    gives: int

    @property
    def rows(self) -> int:
        """Rows of the pass, streams included."""
        return self.real + self.gives - 1


def branch_passes(tokens_per_pass: Sequence[int], depth: int, first: int = 1) -> tuple[BranchPass, ...]:
    """Return the passes that give a branch `depth` tokens.

    Args:
        tokens_per_pass: at most so many in pass 0, 1, ...; the last number repeats.
        first: tokens that the first pass has to read.
    """
    passes: list[BranchPass] = []
    left = depth
    while left > 0:
        most = tokens_per_pass[min(len(passes), len(tokens_per_pass) - 1)]
        passes.append(BranchPass(passes[-1].gives if passes else first, min(most, left)))
        left -= passes[-1].gives
    return tuple(passes)


def rollout_capacity(max_length: int, gamma: int, branches: int, tokens_per_pass: Sequence[int]) -> int:
    """Return the slots that a draft's cache needs: the context, a window, and all rows of a rollout's passes."""
    rows = sum(branches * item.rows for item in branch_passes(tokens_per_pass, gamma))
    return max_length + gamma + max(tokens_per_pass) + max(rows, 1)
