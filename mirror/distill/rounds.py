"""What a draft and its candidates are worth in rounds, from positions of texts. Pure: numpy alone.

A target's own text is all that matters for a greedy round: draft tokens are judged only while all
before them agreed with that text, so one teacher-forced pass says what every round would do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Round:
    """One round of a text: its window began at `start`, and `accepted` draft tokens were kept."""

    start: int
    accepted: int

    @property
    def stop(self) -> int:
        """The position whose next token ended the round, and where the next window begins from."""
        return self.start + self.accepted


def rounds(agreed: Bools) -> Iterator[Round]:
    """Yield the rounds over a text.

    Args:
        agreed: bool `[n, gamma]`: whether token d of a window that begins at position p is the text's, all
            before it being so. Position 0 is the last of the prompt: its next token comes from the
            prefill, no round makes it.

    Yields:
        Rounds whose outcome lies within the text.
    """
    length, gamma = agreed.shape
    wrong = np.where(agreed.all(1), gamma, np.argmin(agreed, 1)) if gamma else np.zeros(length, int)
    at = 1
    while at < length:
        accepted = int(wrong[at])
        if at + accepted >= length:
            return
        yield Round(at, accepted)
        at += accepted + 1


def windows_of(agreed: Sequence[bool], gamma: int) -> Bools:
    """Return `agreed` as `rounds` takes it, for a draft whose choice at a position doesn't depend on the window."""
    return _shifted(np.asarray(agreed, bool), gamma, True)


def tokens_per_round(texts: Iterable[Bools]) -> float:
    """Return the tokens that a round commits on average, over all rounds of all texts."""
    accepted = [found.accepted for agreed in texts for found in rounds(agreed)]
    return 1.0 + float(np.mean(accepted)) if accepted else 1.0


@dataclass(frozen=True)
class Positions:
    """What is known at the answer's positions of one text, each about the token after it.

    `tokens`: int64 `[n]`, the target's choice. `draft`: int64 `[n, top]`, the draft's likeliest tokens,
    likeliest first, -1 for none. `exits`: the same of each exit layer's head. `ahead`: int64 `[n, streams]`, what
    stream s says at a position about the token s places further on. `branch`: int64 `[n, most]`, for a draft fed by
    features: what its row d places further on says within a branch that leaves here, where it has no feature.
    """

    tokens: Ints
    draft: Ints
    exits: Mapping[int, Ints]
    ahead: Ints = field(default_factory=lambda: np.zeros((0, 0), np.int64))
    branch: Ints = field(default_factory=lambda: np.zeros((0, 0), np.int64))

    def windows(self, gamma: int, tokens_per_pass: Sequence[int] = (1,)) -> Ints:
        """Return the tokens `[n, gamma]` of a window that begins at each position; -1 past what is known.

        Args:
            gamma: tokens of a window.
            tokens_per_pass: tokens that pass 0, 1, .. of a rollout emits; the last number repeats.
        """
        columns = []
        for base, stream in _passes(gamma, tokens_per_pass):
            if base and stream == 0 and self.branch.size:
                columns.append(self.branch[:, base - 1])
                continue
            said = self.draft[:, 0] if stream == 0 else self.ahead[:, stream - 1]
            columns.append(np.append(said[base:], np.full(min(base, len(said)), -1)))
        return np.stack(columns, 1)

    def agreed(self, gamma: int, tokens_per_pass: Sequence[int] = (1,)) -> Bools:
        """Return which of these tokens are the text's, bool `[n, gamma]`."""
        found: Bools = self.windows(gamma, tokens_per_pass) == _shifted(self.tokens, gamma, -2)
        return found


def _passes(gamma: int, tokens_per_pass: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield for each window token the tokens before its pass, and its stream (0: the draft's own next token)."""
    base = number = 0
    while base < gamma:
        count = tokens_per_pass[min(number, len(tokens_per_pass) - 1)]
        for stream in range(min(count, gamma - base)):
            yield base, stream
        base, number = base + count, number + 1


def _shifted(values: NDArray[Any], gamma: int, beyond: Any) -> NDArray[Any]:
    """Return `[n, gamma]`: the values at a position and after it, `beyond` past the end."""
    padded = np.append(values, np.full(gamma, beyond, values.dtype))
    return np.lib.stride_tricks.sliding_window_view(padded, gamma)[: len(values)]


def schedules(gamma: int, passes: int, most: int) -> list[tuple[int, ...]]:
    """Return every way to emit gamma tokens in so many passes, at most `most` in each."""
    if passes == 1:
        return [(gamma,)] if 1 <= gamma <= most else []
    return [
        (first, *rest)
        for first in range(1, min(most, gamma - passes + 1) + 1)
        for rest in schedules(gamma - first, passes - 1, most)
    ]


def coverage(tops: Sequence[Ints], tokens: Sequence[Ints], most: int) -> list[float]:
    """Return the share of positions whose k likeliest tokens hold the target's, for k in 1..most."""
    hits = np.concatenate([top[:, :most] == token[:, None] for top, token in zip(tops, tokens, strict=True)])
    found: list[float] = np.cumsum(hits.mean(0)).tolist()
    return found


@dataclass(frozen=True)
class Outcome:
    """How a round ended, and where its next token stands among the candidates; None where it isn't one."""

    accepted: int
    rank: int | None


def outcomes(
    text: Positions, sources: Sequence[Ints], gamma: int, tokens_per_pass: Sequence[int] = (1,)
) -> list[Outcome]:
    """Return the outcome of every round of a text, with its rank in the merged candidates of the sources.

    Args:
        text: the positions.
        sources: `[n, top]` each, as in `Positions`; merged rank by rank as a rollout merges them.
        gamma: draft tokens per window.
        tokens_per_pass: tokens that each pass of a rollout emits.
    """
    windows = text.windows(gamma, tokens_per_pass)
    found = []
    for each in rounds(windows == _shifted(text.tokens, gamma, -2)):
        # The window's own token is no candidate where verification would go on past it.
        excluded = int(windows[each.start, each.accepted]) if each.accepted < gamma else None
        candidates = merged([source[each.stop] for source in sources], excluded)
        following = int(text.tokens[each.stop])
        found.append(Outcome(each.accepted, candidates.index(following) if following in candidates else None))
    return found


def merged(sources: Sequence[Ints], excluded: int | None) -> list[int]:
    """Return candidates rank by rank over the sources, each once."""
    by_rank = [int(token) for rank in zip(*sources, strict=True) for token in rank]
    return [token for token in dict.fromkeys(by_rank) if token != excluded and token >= 0]


def prepared(found: Sequence[Outcome], fanout: Sequence[int]) -> float:
    """Return the share of outcomes that a fan-out holds: `fanout[i]` branches leave after i accepted tokens."""
    held = [each.rank is not None and each.rank < fanout[each.accepted] for each in found]
    return float(np.mean(held)) if held else 0.0


def shaped_fanout(found: Sequence[Outcome], gamma: int, branches: int, most: int) -> list[int]:
    """Return the fan-out of so many branches in all that holds the most of these outcomes.

    The hits of rank r at a position shrink with r only on average, so a position grows by the run of
    ranks that gains most per branch.
    """
    hits = np.zeros((gamma + 1, most))
    for each in found:
        if each.rank is not None and each.rank < most:
            hits[each.accepted, each.rank] += 1
    fanout = [0] * (gamma + 1)
    while sum(fanout) < branches:
        best = max(((*_gain(hits[i], fanout[i], branches - sum(fanout)), i) for i in range(gamma + 1)), default=None)
        if best is None or best[0] <= 0:
            break
        fanout[best[2]] += best[1]
    return fanout


def _gain(hits: NDArray[np.float64], taken: int, room: int) -> tuple[float, int]:
    """Return the largest mean gain of the next ranks, and how many ranks it takes."""
    runs = np.cumsum(hits[taken : taken + room])
    if not len(runs):
        return 0.0, 0
    means = runs / np.arange(1, len(runs) + 1)
    best = int(np.argmax(means))
    return float(means[best]), best + 1
