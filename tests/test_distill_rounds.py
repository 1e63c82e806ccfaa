"""What a draft is worth in rounds: the pure part of training's measurements."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirror.distill.rounds import (
    Outcome,
    Positions,
    coverage,
    merged,
    outcomes,
    prepared,
    rounds,
    schedules,
    shaped_fanout,
    tokens_per_round,
    windows_of,
)


def test_rounds_of_a_text() -> None:
    # Position 0 belongs to the prefill; 1..3 agree, 4 does not; 5 does not; 6 agrees and the text ends.
    found = list(rounds(windows_of([False, True, True, True, False, False, True], 7)))
    assert [(each.start, each.accepted) for each in found] == [(1, 3), (5, 0)]


def test_a_full_window_ends_at_its_bonus() -> None:
    found = list(rounds(windows_of([True] * 8, 2)))
    assert [(each.start, each.accepted, each.stop) for each in found] == [(1, 2, 3), (4, 2, 6)]


@given(st.lists(st.booleans(), max_size=60), st.integers(1, 8))
def test_rounds_tile_the_text(agreed: list[bool], gamma: int) -> None:
    at = 1
    for each in rounds(windows_of(agreed, gamma)):
        assert each.start == at
        assert all(agreed[each.start : each.stop])
        assert each.accepted == gamma or not agreed[each.stop]
        at = each.stop + 1


def test_tokens_per_round() -> None:
    assert tokens_per_round([windows_of([True, True, False, False], 7)]) == pytest.approx(1.5)
    assert tokens_per_round([]) == 1.0


def test_merging_takes_rank_by_rank_and_leaves_out() -> None:
    assert merged([np.array([4, 5, 6]), np.array([5, 7, 4])], excluded=5) == [4, 7, 6]


def positions() -> Positions:
    # The draft agrees at 1, fails at 2 (its second choice is right), fails at 3 (not among its three).
    draft = np.array([[9, 1, 2], [8, 1, 2], [7, 5, 2], [6, 1, 2]])
    exits = {2: np.array([[9, 1, 2], [8, 1, 2], [7, 2, 5], [4, 6, 3]])}
    return Positions(np.array([9, 8, 5, 3]), draft, exits)


def test_outcomes_rank_what_came() -> None:
    text = positions()
    assert outcomes(text, [text.draft], 7) == [Outcome(1, 0), Outcome(0, None)]
    assert outcomes(text, [text.exits[2]], 7) == [Outcome(1, 1), Outcome(0, 1)]
    # Merged: exit 7, draft 7, exit 2, draft 5: without the window's 7, 5 is second.
    assert outcomes(text, [text.exits[2], text.draft], 7)[0] == Outcome(1, 1)


def test_a_full_window_excludes_nothing() -> None:
    text = Positions(np.array([1, 2, 3]), np.array([[1], [2], [3]]), {})
    assert outcomes(text, [text.draft], 1) == [Outcome(1, 0)]


def test_prepared_and_coverage() -> None:
    found = [Outcome(0, 0), Outcome(0, 3), Outcome(1, None), Outcome(1, 1)]
    assert prepared(found, [4, 2]) == 0.75
    assert prepared(found, [1, 2]) == 0.5
    assert coverage([np.array([[1, 2], [3, 4]])], [np.array([2, 3])], 2) == [0.5, 1.0]


@given(st.lists(st.builds(Outcome, st.integers(0, 3), st.none() | st.integers(0, 6)), min_size=1), st.integers(1, 7))
def test_a_shape_is_never_worse_than_uniform_where_it_was_fitted(found: list[Outcome], kappa: int) -> None:
    shape = shaped_fanout(found, gamma=3, branches=4 * kappa, most=7)
    assert sum(shape) <= 4 * kappa
    # Runs of ranks are taken by mean gain, so only the last run can be cut short by the budget.
    assert prepared(found, shape) >= prepared(found, [kappa] * 4) - max(shape) / len(found)


def counting(streams: list[list[bool]]) -> Positions:
    """Return a text 0, 1, 2, ... and what its draft says: right where `streams[s][position]` says so."""
    count = len(streams[0])
    said = [[at + s if right else -9 for at, right in enumerate(row)] for s, row in enumerate(streams)]
    ahead = np.array(said[1:], dtype=np.int64).T
    return Positions(np.arange(count), np.array(said[0])[:, None], {}, ahead)


def test_streams_say_what_lies_further_on() -> None:
    text = counting([[True] * 6, [True] * 6])
    assert text.windows(4, (2, 1)).tolist()[0] == [0, 1, 2, 3]
    assert text.windows(4, (2, 1)).tolist()[3] == [3, 4, 5, -1]  # the text ends before the pass at its position 6


def test_a_pass_that_is_wrong_ends_the_window_where_it_erred() -> None:
    # The stream is wrong at position 2 alone: it says token 3 of windows whose second pass begins there.
    text = counting([[True] * 8, [True, True, False, True, True, True, True, True]])
    assert [each.accepted for each in rounds(text.agreed(4, (2, 2)))] == [4]
    assert text.agreed(4, (2, 2))[0].tolist() == [True, True, True, False]
    assert text.agreed(4, (1,))[0].tolist() == [True] * 4


def test_a_fed_draft_answers_for_itself_within_a_branch() -> None:
    text = Positions(np.arange(6), np.arange(6)[:, None], {}, branch=np.full((6, 2), -5))
    assert text.agreed(3)[1].tolist() == [True, False, False]


def test_the_windows_own_token_is_no_candidate_even_where_the_draft_knows_better() -> None:
    # A stream put -9 at position 2; the draft's own row there says 2, which is right and so was prepared.
    text = counting([[True] * 5, [True, False, True, True, True]])
    (found, *_) = outcomes(text, [text.draft], 3, (2, 1))
    assert found == Outcome(1, 0)


@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 8))
def test_schedules_are_all_ways_to_share_a_window(gamma: int, most: int, passes: int) -> None:
    found = schedules(gamma, passes, most)
    assert len(set(found)) == len(found)
    assert all(sum(each) == gamma and len(each) == passes and max(each) <= most for each in found)
    assert bool(found) == (passes <= gamma <= passes * most)
