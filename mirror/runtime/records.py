"""The frozen records that travel between the stages of a round.

Numbers and numpy only: no session, no thread, no text. Times are seconds of one monotonic clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]

NO_INTS: Ints = np.empty(0, np.int64)


class Mode(Enum):
    """How tokens are made. PLAIN: one per target pass. SERIAL: draft, then verify. MIRROR: overlapped."""

    PLAIN = "plain"
    SERIAL = "serial"
    MIRROR = "mirror"


class FinishReason(Enum):
    """Why a generation ended: end token or stop string, a length limit, or the caller's wish."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


class Lane(Enum):
    """Who spent a span of time."""

    TARGET = "target"
    DRAFT = "draft"
    HOST = "host"


@dataclass(frozen=True, slots=True)
class Span:
    """One piece of a round's time. Names: see `statistics.SPAN_NAMES`."""

    name: str
    lane: Lane
    start_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end_s - self.start_s


@dataclass(frozen=True, slots=True)
class Candidates:
    """The likely next tokens of each window position, likeliest first.

    Attributes:
        ids: int64 [positions, kappa + 1]; -1 where there is none.
        logprobs: float32, the same shape; None where the source has no odds.
    """

    ids: Ints
    logprobs: Floats | None


@dataclass(frozen=True, slots=True)
class Branches:
    """The branches of one rollout, keyed by (accepted count, next token).

    Attributes:
        accepted: int64 [branches], the window position i that a branch leaves after.
        next_tokens: int64 [branches], the candidate c at that position.
    """

    accepted: Ints
    next_tokens: Ints

    def __len__(self) -> int:
        return int(self.accepted.shape[0])

    def row(self, outcome: Outcome) -> int | None:
        """Return the row of the branch that an outcome takes, None if it wasn't prepared."""
        rows = np.flatnonzero((self.accepted == outcome.accepted) & (self.next_tokens == outcome.next_token))
        return int(rows[0]) if rows.size else None


NO_BRANCHES = Branches(NO_INTS, NO_INTS)


@dataclass(frozen=True, slots=True)
class Rollout:
    """The branches of one window and how they go on.

    Attributes:
        lengths: int64 [branches], how many tokens of each row are valid.
        continuations: int64 [branches, depth].
    """

    branches: Branches
    lengths: Ints
    continuations: Ints
    spans: tuple[Span, ...] = ()

    def find(self, outcome: Outcome) -> tuple[int, ...] | None:
        """Return the next window's draft tokens, None if no branch fits the outcome."""
        row = self.branches.row(outcome)
        if row is None:
            return None
        return tuple(self.continuations[row, : self.lengths[row]].tolist())


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one verification found; equal outcomes take the same branch.

    Attributes:
        accepted: draft tokens kept, 0..gamma.
        next_token: the target's own token after them: the correction, or the bonus.
    """

    accepted: int
    next_token: int


@dataclass(frozen=True, slots=True)
class Round:
    """One round as it went.

    Attributes:
        mode: the mode it ran in.
        proposed: draft tokens in the window.
        accepted: draft tokens kept.
        committed: tokens that reached the text; less than accepted + 1 only where it ended.
        reused: whether a branch fitted; None where none was wanted.
        branches: branches begun by the rollout.
        spans: every device call and wait, of the target's and the draft's threads.
    """

    mode: Mode
    proposed: int
    accepted: int
    committed: int
    reused: bool | None
    branches: int
    start_s: float
    end_s: float
    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class Event:
    """Something that the user should hear of, such as a lost draft."""

    kind: str
    message: str
