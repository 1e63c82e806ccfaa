"""What a draft proposes: tokens that are there, or tokens that its device is making still.

The target's device may take the latter in its own order of work, so that nothing stands still while the host learns of
them; the host reads them meanwhile.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from mirror.runtime.guesses import Launched
from mirror.runtime.records import Ints, Lane, Span
from mirror.targets.base import FollowOn


@dataclass(frozen=True, slots=True)
class Proposal:
    """What a draft proposes to follow the committed tokens; may be shorter than asked, or empty."""

    tokens: tuple[int, ...]
    spans: tuple[Span, ...] = ()

    def read(self) -> Proposal:
        """Return itself."""
        return self


@dataclass(frozen=True, slots=True)
class LaunchedProposal:
    """A proposal whose passes were launched; each token is one that the target knows.

    Attributes:
        guesses: what each pass gives, fetched, of one branch.
        start_s: when the first began.
        earlier: spans of the draft's that nobody has been told of yet.
    """

    guesses: tuple[Launched, ...]
    start_s: float
    earlier: tuple[Span, ...] = ()

    @property
    def count(self) -> int:
        """How many tokens it will have."""
        return sum(guess.count for guess in self.guesses)

    def follow(self, ids: Ints) -> FollowOn:
        """Return a window's ids, int64 `[1, width]`, with these tokens behind the first."""
        places = np.cumsum([1, *(guess.count for guess in self.guesses)]).tolist()
        parts = (guess.part(place, 0) for guess, place in zip(self.guesses, places, strict=False))
        return FollowOn(ids, tuple(parts))

    def read(self) -> Proposal:
        """Wait for the tokens."""
        tokens = np.concatenate([guess.tokens()[0] for guess in self.guesses])
        span = Span("propose", Lane.DRAFT, self.start_s, time.perf_counter())
        return Proposal(tuple(tokens.tolist()), (*self.earlier, span))
