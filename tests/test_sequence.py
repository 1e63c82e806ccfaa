"""The cursor of the target's cache, and where an answer ends."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirror.errors import CapacityError
from mirror.runtime.records import FinishReason
from mirror.runtime.sequence import Sequence
from mirror.runtime.stopping import Stopping

PROMPTS = st.lists(st.integers(0, 2), min_size=1, max_size=12)


@given(st.lists(st.tuples(PROMPTS, st.lists(st.integers(0, 2), max_size=4), st.integers(0, 20)), max_size=6))
def test_kept_rows_are_always_a_beginning_that_both_contexts_share(
    turns: list[tuple[list[int], list[int], int]],
) -> None:
    sequence = Sequence(32)
    held: list[int] = []  # the tokens that the cache really holds, slot by slot
    for prompt, answer, extra in turns:
        kept = sequence.begin(np.array(prompt), reuse=True)
        assert kept == sequence.cached <= len(prompt) - 1
        assert held[:kept] == prompt[:kept]
        # The longest such beginning: it ends at the prompt's last token, at a difference or with the cache.
        assert kept == len(prompt) - 1 or kept == len(held) or held[kept] != prompt[kept]
        sequence.append(tuple(answer))
        assert sequence.tokens.tolist() == prompt + answer
        sequence.cached = len(sequence) - 1 + extra  # a last window may run past what was committed
        sequence.settle()
        held = (prompt + answer)[:-1]
        assert sequence.cached == len(held)


def test_without_reuse_nothing_is_kept() -> None:
    sequence = Sequence(8)
    sequence.begin(np.array([1, 2, 3]), reuse=False)
    sequence.cached = 2
    assert sequence.begin(np.array([1, 2, 3]), reuse=False) == 0


def test_a_prompt_without_room_for_an_answer_is_refused_with_figures() -> None:
    with pytest.raises(CapacityError, match="prompt has 4 tokens and the cache holds 4"):
        Sequence(4).begin(np.arange(4), reuse=False)
    assert Sequence(4).begin(np.arange(3), reuse=False) == 0


@given(
    st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=4), max_size=8),
    st.integers(1, 12),
    st.sets(st.integers(0, 5), max_size=2),
    st.none() | st.integers(1, 12),
)
def test_where_an_answer_ends_does_not_depend_on_the_grouping(
    commits: list[list[int]], limit: int, eos: set[int], stop_after: int | None
) -> None:
    def end(groups: list[list[int]]) -> tuple[list[int], FinishReason | None]:
        pushed, out = 0, []

        def stop_text(tokens: tuple[int, ...]) -> int | None:
            nonlocal pushed
            before, pushed = pushed, pushed + len(tokens)
            return stop_after - before if stop_after is not None and before < stop_after <= pushed else None

        stopping = Stopping(eos, limit, stop_text)  # type: ignore[arg-type]
        for group in groups:
            kept, reason = stopping.cut(tuple(group))
            out += kept
            assert stopping.left == limit - len(out)
            if reason is not None:
                return out, reason
        return out, None

    one_by_one = [[token] for group in commits for token in group]
    assert end(commits) == end(one_by_one)
