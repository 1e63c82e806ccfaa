"""Which draft tokens stand: those that equal the target's own choice. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mirror.runtime.records import Outcome


def verify(window: Sequence[int], choose: Callable[[int], int]) -> Outcome:
    """Return how many draft tokens of a window stand, and the target's token after them.

    Args:
        window: x_0 (committed) and the draft tokens x_1..x_gamma.
        choose: returns y_i, the target's token after x_i. Called for i = 0, 1, .. in order and
            only while every draft token before has been accepted, so rows past the first mismatch
            cost nothing and `choose` may count on x_1..x_i being committed.
    """
    last = len(window) - 1
    for position in range(last):
        token = choose(position)
        if token != window[position + 1]:
            return Outcome(position, token)
    return Outcome(last, choose(last))
