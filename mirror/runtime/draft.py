"""What the round loop asks of a draft, and where a round's two threads meet."""

from __future__ import annotations

import threading
import time
from typing import Protocol

from mirror.runtime.proposal import LaunchedProposal, Proposal
from mirror.runtime.records import Candidates, Floats, Ints, Outcome, Rollout
from mirror.runtime.sampling import CoupledNoise


class Meeting:
    """Where the target's thread and the draft's thread meet in one round.

    The target's thread offers the exit's states and candidates and decides the outcome; the draft's
    thread waits for the former, if it wants them, and, between two passes, looks for the latter. Each
    is set once.

    Attributes:
        decided_s: when the outcome was known; None before.
    """

    def __init__(self) -> None:
        self._stated = threading.Event()
        self._states: Floats | None = None
        self._offered = threading.Event()
        self._candidates: Candidates | None = None
        self._outcome: Outcome | None = None
        self._abandoned = False
        self.decided_s: float | None = None

    def state(self, states: Floats) -> None:
        """Hand over the exit layer's states of the window's rows, `[rows, hidden]`, for the draft to keep."""
        self._states = states
        self._stated.set()

    def offer(self, candidates: Candidates) -> None:
        """Hand over the exit's candidates; the arrays stay valid until the round is over."""
        self._candidates = candidates
        self._offered.set()

    def decide(self, outcome: Outcome) -> None:
        """Tell the outcome: branches that it doesn't take need not be continued."""
        self.decided_s = time.perf_counter()
        self._outcome = outcome

    def abandon(self) -> None:
        """Tell that nobody wants the rollout any more."""
        self._abandoned = True
        self._stated.set()
        self._offered.set()

    def wait_states(self) -> Floats | None:
        """Wait for the exit layer's states; None if the round was abandoned."""
        self._stated.wait()
        return self._states

    def wait_candidates(self) -> Candidates | None:
        """Wait for the exit's candidates; None if the round was abandoned."""
        self._offered.wait()
        return self._candidates

    @property
    def outcome(self) -> Outcome | None:
        """The outcome, None while it isn't known."""
        return self._outcome

    @property
    def abandoned(self) -> bool:
        """Whether nobody wants the rollout any more."""
        return self._abandoned


class Draft(Protocol):
    """A proposer of tokens. Its methods run on one thread at a time; only proposals leave it.

    `tokens` is always the whole committed context, int64 [n], whose last token x_0 is the first of
    the next window. A draft keeps what it has read and reads on from there.
    """

    def keep(self, length: int) -> None:
        """Forget everything read past the first `length` tokens: the context has changed there."""
        ...

    def see_states(self, start: int, states: Floats) -> None:
        """Take the exit layer's states `[n, hidden]` of the tokens at positions `start..`."""
        ...

    def read(self, tokens: Ints) -> None:
        """Read a context ahead of time, as during the target's prefill."""
        ...

    def draw_ahead(self, noise: CoupledNoise, position: int, count: int) -> None:
        """Draw the noise of the tokens at positions `position..position + count - 1`, while nobody waits for it.

        Passes draw what they lack themselves.
        """
        ...

    def propose(self, tokens: Ints, count: int, noise: CoupledNoise | None) -> Proposal | LaunchedProposal:
        """Return at most `count` tokens to follow the context, just so many of a device that makes them still.

        Args:
            noise: what the target's own draws will be made with; None where it takes the likeliest.
        """
        ...

    def roll_out(self, tokens: Ints, window: Ints, depth: int, meeting: Meeting, noise: CoupledNoise | None) -> Rollout:
        """Continue every likely outcome of a window by `depth` tokens.

        Args:
            window: x_0..x_gamma, int64; `tokens` ends in x_0.
            meeting: this round's.
            noise: as in `propose`.
        """
        ...
