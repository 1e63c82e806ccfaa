"""How a text would have been speculated: which draft tokens stand, which outcomes a fan-out prepares. Pure.

For a greedy round this is no approximation: a draft token counts only while all before it agree with
the target's own text, so what the draft says along that text is all there is to know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mirror.runtime.candidates import CandidateSource
from mirror.runtime.records import Ints

Shares = NDArray[np.float64]
_NEVER = 2**31  # the rank of a token that isn't among the candidates


@dataclass(frozen=True)
class Sample:
    """One answer and what was offered for each of its tokens.

    Attributes:
        tokens: int64 [n], the target's own.
        draft, exits: int64 [n, top], likeliest first; -1 where nothing was offered.
    """

    tokens: Ints
    draft: Ints
    exits: Ints


@dataclass(frozen=True)
class Ranks:
    """Where a text's tokens stand among the candidates of one source.

    Attributes:
        right: bool [n], whether the draft's likeliest token is the target's.
        wrong: int64, for the other tokens: the rank among the candidates without the draft's likeliest.
        bonus: int64 [n], the rank among all candidates, as at a window's end.
    """

    right: NDArray[np.bool_]
    wrong: Ints
    bonus: Ints


def rank_tokens(sample: Sample, source: CandidateSource) -> Ranks:
    """Return the ranks of one answer's tokens, in the order in which a rollout takes candidates."""
    lists = [sample.draft] if source.needs_draft else []
    lists += [sample.exits] if source.needs_exit else []
    offered = np.stack(lists, axis=2).reshape(sample.tokens.size, -1) if sample.tokens.size else lists[0]
    right = sample.draft[:, 0] == sample.tokens
    wrong, bonus = [], []
    for row, token, own, stands in zip(offered, sample.tokens, sample.draft[:, 0], right, strict=True):
        order = list(dict.fromkeys(row[row >= 0].tolist()))
        bonus.append(_place(order, int(token)))
        if not stands:
            wrong.append(_place([item for item in order if item != own], int(token)))
    return Ranks(right, np.array(wrong, np.int64), np.array(bonus, np.int64))


def _place(order: Sequence[int], token: int) -> int:
    return order.index(token) if token in order else _NEVER


def accepted_shares(texts: Sequence[NDArray[np.bool_]], gamma: int) -> Shares:
    """Return how often 0, 1, .. gamma draft tokens stand, walking through texts round by round; they add up to 1.

    Args:
        texts: for each answer, whether the draft's token would stand at each place.
    """
    counts = np.zeros(gamma + 1)
    for right in texts:
        place = 0
        while place < right.size:
            window = right[place : place + gamma]
            accepted = int(window.argmin()) if not window.all() else window.size
            counts[accepted] += 1
            place += accepted + 1
    shares: Shares = counts / max(counts.sum(), 1.0)
    return shares


def shares_of_counts(accepted: Sequence[int], gamma: int) -> Shares:
    """Return the shares of measured rounds, those of a wider window cut at gamma."""
    counts = np.bincount(np.minimum(np.array(accepted, np.int64), gamma), minlength=gamma + 1)
    shares: Shares = counts / max(len(accepted), 1)
    return shares


def coverage(ranks: Ints, kappa: int) -> Shares:
    """Return the share of ranks below 0, 1, .. kappa, float64 [kappa + 1]; nothing is covered without ranks."""
    if ranks.size == 0:
        return np.zeros(kappa + 1)
    return np.array([float((ranks < count).mean()) for count in range(kappa + 1)])


@dataclass(frozen=True)
class Foresight:
    """What one source prepares.

    Attributes:
        wrong, bonus: float64 [kappa + 1], the share of outcomes that the first 0, 1, .. kappa candidates hold:
            at a mismatch, and after a window that stood.
    """

    wrong: Shares
    bonus: Shares

    def at(self, position: int, gamma: int) -> Shares:
        """Return the coverage at a window position."""
        return self.bonus if position == gamma else self.wrong

    def prepared(self, shares: Shares, fanout: Sequence[int]) -> float:
        """Return the share of rounds whose outcome a fan-out prepares."""
        gamma = len(fanout) - 1
        return float(sum(shares[i] * self.at(i, gamma)[count] for i, count in enumerate(fanout)))

    def shape(self, shares: Shares, branches: int) -> tuple[int, ...]:
        """Return the fan-out that gives each of some branches to where it prepares the most.

        Args:
            shares: how often a window is left after each position, float64 [gamma + 1].
        """
        gamma = shares.size - 1
        gains = []  # (what a branch adds, position); the n-th of a position is its n-th candidate
        for position in range(gamma + 1):
            added = np.sort(np.diff(self.at(position, gamma)))[::-1]
            gains += [(float(shares[position] * gain), position) for gain in added]
        taken = sorted(gains, key=lambda item: -item[0])[:branches]
        counts = np.bincount([position for _, position in taken], minlength=gamma + 1)
        return tuple(int(count) for count in counts)


def foresee(samples: Sequence[Sample], source: CandidateSource, kappa: int) -> Foresight:
    """Return what a source prepares on some answers."""
    ranks = [rank_tokens(sample, source) for sample in samples]
    wrong = np.concatenate([item.wrong for item in ranks])
    bonus = np.concatenate([item.bonus for item in ranks])
    return Foresight(coverage(wrong, kappa), coverage(bonus, kappa))
