"""The branches of a rollout against a plain loop over ranks."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mirror.runtime.candidates import choose_branches
from mirror.runtime.records import Candidates, Outcome


def _candidates(rows: list[list[int]]) -> Candidates:
    return Candidates(np.array(rows, np.int64), None)


def _by_hand(window: list[int], sources: list[list[list[int]]], fanout: list[int]) -> list[tuple[int, int]]:
    branches = []
    for position in range(len(window)):
        chosen: list[int] = []
        for rank in range(max(len(source[position]) for source in sources)):
            for source in sources:
                token = source[position][rank] if rank < len(source[position]) else -1
                own = position + 1 < len(window) and token == window[position + 1]
                if token >= 0 and not own and token not in chosen and len(chosen) < fanout[position]:
                    chosen.append(token)
        branches += [(position, token) for token in chosen]
    return branches


@given(st.data())
def test_branches_equal_the_loop_over_ranks(data: st.DataObject) -> None:
    width = data.draw(st.integers(1, 5))
    window = data.draw(st.lists(st.integers(0, 6), min_size=width, max_size=width))
    fanout = data.draw(st.lists(st.integers(0, 4), min_size=width, max_size=width + 2))
    sources = []
    for _ in range(data.draw(st.integers(1, 2))):
        top = data.draw(st.integers(1, 5))
        rows = st.lists(st.integers(-1, 6), min_size=top, max_size=top)
        sources.append(data.draw(st.lists(rows, min_size=width, max_size=width)))
    found = choose_branches(np.array(window), [_candidates(rows) for rows in sources], np.array(fanout))
    pairs = list(zip(found.accepted.tolist(), found.next_tokens.tolist(), strict=True))
    assert pairs == _by_hand(window, sources, fanout)
    # Reuse is by equality of the key alone, and every key finds its own row.
    assert [found.row(Outcome(*pair)) for pair in pairs] == list(range(len(pairs)))
    assert found.row(Outcome(width, 0)) is None


def test_the_windows_own_token_is_no_candidate_but_at_the_last_position() -> None:
    rows = [[1, 2, 3], [1, 2, 3]]
    found = choose_branches(np.array([0, 1]), [_candidates(rows)], np.array([2, 2]))
    assert found.accepted.tolist() == [0, 0, 1, 1]
    assert found.next_tokens.tolist() == [2, 3, 1, 2]
