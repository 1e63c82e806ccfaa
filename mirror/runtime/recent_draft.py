"""A draft that reads the end of a long context only.

What a draft reads decides how often it is right, never what comes out; and what it attends to costs time in every
pass, once for each branch. Its own cache begins anew when the end has grown to the limit, with the last half of it.
"""

from __future__ import annotations

import dataclasses

from mirror.runtime.draft import Draft, Meeting
from mirror.runtime.proposal import LaunchedProposal, Proposal
from mirror.runtime.records import Floats, Ints, Rollout
from mirror.runtime.sampling import CoupledNoise


class RecentDraft:
    """Gives a draft the last tokens of every context, at most `limit` and, of a longer one, at least half as many.

    The draft counts positions from the first of these, where it has been trained; only noise has absolute ones.
    """

    def __init__(self, inner: Draft, limit: int) -> None:
        """Take a draft that is not fed by the target's states, which are not kept here.

        Args:
            limit: tokens, 2 or more.
        """
        self._inner = inner
        self._limit = limit
        self._skipped = 0  # tokens before the first that the draft has read

    def keep(self, length: int) -> None:
        """Forget everything read past the first `length` tokens."""
        self._inner.keep(max(length - self._skipped, 0))

    def see_states(self, start: int, states: Floats) -> None:
        """Take the exit layer's states, for nothing."""

    def read(self, tokens: Ints) -> None:
        """Read the end of a context ahead of time."""
        self._inner.read(self._recent(tokens))

    def draw_ahead(self, noise: CoupledNoise, position: int, count: int) -> None:
        """Draw the noise of positions ahead of time."""
        self._inner.draw_ahead(self._of_recent(noise), position - self._skipped, count)

    def propose(self, tokens: Ints, count: int, noise: CoupledNoise | None) -> Proposal | LaunchedProposal:
        """Return at most `count` tokens to follow the end of the context."""
        recent = self._recent(tokens)
        return self._inner.propose(recent, count, noise and self._of_recent(noise))

    def roll_out(self, tokens: Ints, window: Ints, depth: int, meeting: Meeting, noise: CoupledNoise | None) -> Rollout:
        """Continue every likely outcome of a window by `depth` tokens."""
        recent = self._recent(tokens)
        return self._inner.roll_out(recent, window, depth, meeting, noise and self._of_recent(noise))

    def _recent(self, tokens: Ints) -> Ints:
        """Return what the draft is to see of a context, and let it forget what it has read where that begins anew."""
        count, half = tokens.size - self._skipped, self._limit // 2
        if not min(half, tokens.size) <= count <= self._limit:
            self._skipped = tokens.size - half if tokens.size > self._limit else 0
            self._inner.keep(0)
        return tokens[self._skipped :]

    def _of_recent(self, noise: CoupledNoise) -> CoupledNoise:
        """Return the noise by the draft's own positions."""
        return dataclasses.replace(noise, skipped=self._skipped)
