"""What a draft and its candidates are worth in rounds, from positions of texts. Pure: numpy alone.

A target's own text is all that matters for a greedy round: draft tokens are judged only while all
before them agreed with that text, so one teacher-forced pass says what every round would do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Round:
    """One round of a text: its window began at `start`, and `accepted` draft tokens were kept."""

    start: int
    accepted: int

    @property
    def stop(self) -> int:
        """The position whose next token ended the round, and where the next window begins from."""
        return self.start + self.accepted


def rounds(agreed: Sequence[bool], gamma: int) -> Iterator[Round]:
    """Yield the rounds over a text.

    Args:
        agreed: whether the draft's choice after each position is the text's next token. Position 0 is
            the last of the prompt: its next token comes from the prefill, no round makes it.
        gamma: draft tokens per window.

    Yields:
        Rounds whose outcome lies within the text.
    """
    at = 1
    while at < len(agreed):
        accepted = 0
        while accepted < gamma and at + accepted < len(agreed) and agreed[at + accepted]:
            accepted += 1
        if at + accepted >= len(agreed):
            return
        yield Round(at, accepted)
        at += accepted + 1


def tokens_per_round(texts: Sequence[Sequence[bool]], gamma: int) -> float:
    """Return the tokens that a round commits on average, over all rounds of all texts."""
    accepted = [found.accepted for agreed in texts for found in rounds(agreed, gamma)]
    return 1.0 + float(np.mean(accepted)) if accepted else 1.0


@dataclass(frozen=True)
class Positions:
    """What is known at the answer's positions of one text, each about the token after it.

    `tokens`: int64 `[n]`, the target's choice. `draft`: int64 `[n, top]`, the draft's likeliest tokens,
    likeliest first. `exits`: the same of each exit layer's head.
    """

    tokens: Ints
    draft: Ints
    exits: Mapping[int, Ints]

    @property
    def agreed(self) -> list[bool]:
        """Whether the draft's likeliest token is the target's."""
        found: list[bool] = (self.draft[:, 0] == self.tokens).tolist()
        return found


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


def outcomes(text: Positions, sources: Sequence[Ints], gamma: int) -> list[Outcome]:
    """Return the outcome of every round of a text, with its rank in the merged candidates of the sources.

    Args:
        text: the positions.
        sources: `[n, top]` each, as in `Positions`; merged rank by rank as a rollout merges them.
        gamma: draft tokens per window.
    """
    found = []
    for each in rounds(text.agreed, gamma):
        # The window's own token is no candidate where verification would go on past it.
        excluded = int(text.draft[each.stop, 0]) if each.accepted < gamma else None
        candidates = merged([source[each.stop] for source in sources], excluded)
        following = int(text.tokens[each.stop])
        found.append(Outcome(each.accepted, candidates.index(following) if following in candidates else None))
    return found


def merged(sources: Sequence[Ints], excluded: int | None) -> list[int]:
    """Return candidates rank by rank over the sources, each once."""
    by_rank = [int(token) for rank in zip(*sources, strict=True) for token in rank]
    return [token for token in dict.fromkeys(by_rank) if token != excluded]


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
