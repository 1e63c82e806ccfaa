"""Verification keeps exactly the leading draft tokens that the target would have chosen itself."""

from hypothesis import given
from hypothesis import strategies as st

from mirror.runtime.acceptance import verify
from mirror.runtime.records import Outcome

TOKENS = st.integers(0, 3)


def test_all_kept_gives_the_bonus() -> None:
    assert verify([5, 1, 2], lambda row: [1, 2, 9][row]) == Outcome(2, 9)


def test_first_mismatch_gives_the_correction() -> None:
    assert verify([5, 1, 2, 3], lambda row: [1, 7, 3, 4][row]) == Outcome(1, 7)


def test_a_window_of_one_is_a_plain_step() -> None:
    assert verify([5], lambda row: 8) == Outcome(0, 8)


@given(st.lists(TOKENS, min_size=1, max_size=9), st.lists(TOKENS, min_size=9, max_size=9))
def test_kept_tokens_are_the_longest_agreeing_beginning(window: list[int], choices: list[int]) -> None:
    asked: list[int] = []

    def choose(row: int) -> int:
        asked.append(row)
        return choices[row]

    outcome = verify(window, choose)
    agreeing = 0
    while agreeing < len(window) - 1 and window[agreeing + 1] == choices[agreeing]:
        agreeing += 1
    assert outcome == Outcome(agreeing, choices[agreeing])
    # Rows past the first mismatch are never processed, and none twice.
    assert asked == list(range(agreeing + 1))
