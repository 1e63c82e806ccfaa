"""How many passes a continuation takes, and how large they are. Pure integers.

A pass gives each branch `1 + streams` tokens: the one after its last real row, and one for each stream
row that follows it. The next pass feeds them all as real rows.
"""

from __future__ import annotations

import functools
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
    return _branch_passes(tuple(tokens_per_pass), depth, first)


@functools.cache  # each round asks again
def _branch_passes(tokens_per_pass: tuple[int, ...], depth: int, first: int) -> tuple[BranchPass, ...]:
    passes: list[BranchPass] = []
    left = depth
    while left > 0:
        most = tokens_per_pass[min(len(passes), len(tokens_per_pass) - 1)]
        passes.append(BranchPass(passes[-1].gives if passes else first, min(most, left)))
        left -= passes[-1].gives
    return tuple(passes)


def branches_at(number: int, branches: int, branches_per_pass: Sequence[int]) -> int:
    """Return how many of a rollout's branches take part in a pass.

    Args:
        number: the pass's, from 0.
        branches_per_pass: at most so many in pass 0, 1, ...; the last number repeats. Empty sets no limit.
    """
    if not branches_per_pass:
        return branches
    return min(branches, branches_per_pass[min(number, len(branches_per_pass) - 1)])


def rollout_capacity(
    max_length: int,
    gamma: int,
    branches: int,
    tokens_per_pass: Sequence[int],
    branches_per_pass: Sequence[int] = (),
    most_given: int = 1,
) -> int:
    """Return the slots that a draft's cache needs: the context, a window, and all rows of a rollout's passes.

    Args:
        branches_per_pass: see `branches_at`.
        most_given: tokens that a pass of a proposal gives, at most.
    """
    passes = enumerate(branch_passes(tokens_per_pass, gamma))
    rows = sum(branches_at(number, branches, branches_per_pass) * item.rows for number, item in passes)
    return max_length + gamma + max(*tokens_per_pass, most_given) + max(rows, 1)
