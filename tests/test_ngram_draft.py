"""Prompt lookup against a search by hand."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mirror.runtime.candidates import CandidateSource
from mirror.runtime.draft import Meeting
from mirror.runtime.ngram_draft import NgramDraft

TOKENS = st.lists(st.integers(0, 3), min_size=1, max_size=20)


def _by_hand(read: list[int], line: list[int], count: int) -> list[int]:
    """Return what followed the latest earlier place of the longest ending of `line` (at most 3 tokens)."""
    for size in range(min(3, len(line)), 0, -1):
        for end in range(len(read) - 1, size - 1, -1):
            if read[end - size : end] == line[-size:]:
                return read[end : end + count]
    return []


def _draft(source: CandidateSource = CandidateSource.DRAFT, fanout: int = 2, gamma: int = 3) -> NgramDraft:
    return NgramDraft(source, np.full(gamma + 1, fanout))


def test_the_longest_and_then_latest_repetition_wins() -> None:
    assert _draft().propose(np.array([1, 2, 3, 7, 9, 2, 3, 8, 1, 2, 3]), 2, None).tokens == (7, 9)
    assert _draft().propose(np.array([2, 3, 7, 9, 2, 3, 8, 5, 2, 3]), 3, None).tokens == (8, 5, 2)
    assert _draft().propose(np.array([1, 2, 3]), 3, None).tokens == ()


@given(TOKENS, st.lists(TOKENS, max_size=4), st.integers(0, 25))
def test_proposals_equal_the_search_by_hand_however_the_context_grew(
    prompt: list[int], additions: list[list[int]], kept: int
) -> None:
    draft, context = _draft(), list(prompt)
    for addition in additions:
        assert list(draft.propose(np.array(context), 3, None).tokens) == _by_hand(context, context, 3)
        context += addition
    # Another prompt that shares a beginning.
    draft.keep(min(kept, len(context)))
    context = [*context[:kept], 3, 1]
    assert list(draft.propose(np.array(context), 3, None).tokens) == _by_hand(context, context, 3)


@given(TOKENS, st.lists(st.integers(0, 3), max_size=3))
def test_every_branch_equals_the_search_by_hand(context: list[int], proposed: list[int]) -> None:
    draft = _draft(fanout=4)
    window = [context[-1], *proposed]
    rollout = draft.roll_out(np.array(context), np.array(window), 3, Meeting(), None)
    pairs = zip(rollout.branches.accepted.tolist(), rollout.branches.next_tokens.tolist(), strict=True)
    for row, (accepted, token) in enumerate(pairs):
        line = [*context, *proposed[:accepted], token]
        expected = _by_hand(context, line, 3)
        assert rollout.continuations[row, : rollout.lengths[row]].tolist() == expected
        # A candidate is a token that followed this place before.
        follows = _by_hand(context, [*context, *proposed[:accepted]], 1)
        assert follows
    # What followed last at the window's end is always among the candidates.
    latest = _by_hand(context, [*context, *proposed], 1)
    if latest:
        at_end = rollout.branches.next_tokens[rollout.branches.accepted == len(proposed)]
        assert latest[0] in at_end.tolist()
