"""Which branches a rollout prepares: the candidates of one or two sources, merged. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

import numpy as np

from mirror.runtime.records import Branches, Candidates, Ints


class CandidateSource(Enum):
    """Where candidates come from: the target's exit head, the draft's own odds, or both."""

    EXIT = "exit"
    DRAFT = "draft"
    BOTH = "both"

    @property
    def needs_exit(self) -> bool:
        """Whether the exit head has to run."""
        return self is not CandidateSource.DRAFT

    @property
    def needs_draft(self) -> bool:
        """Whether the draft's candidates are wanted."""
        return self is not CandidateSource.EXIT


def source_of(setting: str | None, draft_kind: str | None) -> CandidateSource:
    """Return whose candidates rollouts take where the user doesn't say.

    The bundle's setting, else a model's own: with the exit's they would prepare a few more outcomes, but begin only
    when the prefix and the exit head have run, and all GPUs that were measured lost more by that. N-grams have few of
    their own.
    """
    if setting:
        return CandidateSource(setting)
    return CandidateSource.BOTH if draft_kind == "ngram" else CandidateSource.DRAFT


def choose_branches(window: Ints, sources: Sequence[Candidates], fanout: Ints) -> Branches:
    """Return the branches to roll out: per position the best candidates, rank by rank over the sources.

    Args:
        window: int64 [width], x_0..x_gamma. At positions before the last, the window's own next
            token is left out: if it is right, verification doesn't stop there.
        sources: candidates with at least `width` rows each.
        fanout: int64 [>= width], how many branches may leave after each position.

    Returns:
        Branches by ascending position, distinct within a position.
    """
    ids = _interleave([source.ids[: window.size] for source in sources])  # [width, sources * top]
    valid = ids >= 0
    valid[:-1] &= ids[:-1] != window[1:, None]
    same = ids[:, :, None] == ids[:, None, :]  # [width, columns, columns]
    valid &= ~np.tril(same, -1).any(axis=2)
    take = valid & (np.cumsum(valid, axis=1) <= fanout[: window.size, None])
    accepted, column = np.nonzero(take)
    return Branches(accepted, ids[accepted, column])


def by_likelihood(branches: Branches, fanout: Ints) -> Ints:
    """Return the rows of branches by falling odds, as far as a fan-out tells, int64 [branches].

    A fan-out gives each position the branches that are worth having beside all others, so the first third of one
    position's is about as likely as the first third of another's.

    Args:
        branches: as `choose_branches` returns them, by position and within it by rank.
        fanout: what they were chosen with.
    """
    first = np.searchsorted(branches.accepted, branches.accepted)  # of the same position
    ranks = np.arange(1, len(branches) + 1) - first
    order: Ints = np.argsort(ranks / fanout[branches.accepted], kind="stable")
    return order


def likeliest(branches: Branches, fanout: Ints, count: int) -> Branches:
    """Return the `count` likeliest branches, in their order; see `by_likelihood`."""
    if len(branches) <= count:
        return branches
    kept = np.sort(by_likelihood(branches, fanout)[:count])
    return Branches(branches.accepted[kept], branches.next_tokens[kept])


def _interleave(ids: Sequence[Ints]) -> Ints:
    """Return the columns of several `[width, top]` arrays by rank: first of each, second of each, ..."""
    if len(ids) == 1:
        return ids[0]
    width, top = ids[0].shape[0], max(part.shape[1] for part in ids)
    merged = np.full((width, top, len(ids)), -1, np.int64)
    for source, part in enumerate(ids):
        merged[:, : part.shape[1], source] = part
    return merged.reshape(width, -1)
