"""The catalogue inputs of a pass, against `docs/bundle.md`."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirror.bundle import INPUT_NAMES
from mirror.runtime.feeds import FeedPool, chunk_width, fit_width, line_rows

CAPACITY = 40


def _values(pool: FeedPool, width: int) -> dict[str, np.ndarray]:
    return {name: np.asarray(tensor) for name, tensor in pool.at(width).tensors.items()}


def test_every_input_of_the_catalogue_that_a_cursor_gives_is_there_with_its_type() -> None:
    found = _values(FeedPool(CAPACITY, 100), 3)
    of_a_model = {"hidden_states", "logit_rows", "features", "feature_rows"}
    of_a_draw = {"noise", "noise_rows", "inverse_temperature"}
    assert set(found) == set(INPUT_NAMES) - of_a_model - of_a_draw
    shapes = {name: (str(value.dtype), value.shape) for name, value in found.items()}
    assert shapes == {
        "input_ids": ("int64", (1, 3)),
        "position_ids": ("int64", (1, 3)),
        "seqlens_k": ("int32", (1,)),
        "total_sequence_length": ("int32", ()),
        "past_length": ("int32", (1,)),
        "row_visible": ("int32", (3,)),
        "row_branch": ("int32", (3,)),
        "slot_branch": ("int32", (CAPACITY,)),
    }


@given(st.integers(1, 6), st.integers(0, 5), st.integers(0, 20))
def test_a_line_of_tokens_with_padding_behind(count: int, padding: int, past: int) -> None:
    pool, width = FeedPool(CAPACITY, 24), count + padding
    pool.at(width).fill_rows(np.ones(1, int), np.ones(1, int), np.ones(1, int), np.ones(1, int), 9)  # stale
    pool.at(width).fill_causal(np.arange(count) + 5, past)
    found = _values(pool, width)
    assert found["input_ids"][0].tolist() == [*range(5, 5 + count), *[4 + count] * padding]
    # Positions past the model's last one belong to padding and must not leave its tables.
    assert found["position_ids"][0].tolist() == [min(past + row, 23) for row in range(width)]
    assert found["row_visible"].tolist() == [past + row + 1 for row in range(width)]
    assert found["row_branch"].tolist() == [-2] * width
    assert found["past_length"].tolist() == [past]
    assert found["seqlens_k"].tolist() == [past + width - 1]
    assert int(found["total_sequence_length"]) == past + width


@given(st.integers(1, 5), st.integers(0, 4), st.integers(0, 4), st.integers(0, 20))
def test_a_line_and_its_streams_are_placed_as_their_rows_would_be(
    count: int, streams: int, padding: int, past: int
) -> None:
    width, rows = count + streams + padding, np.arange(count + streams)
    pools = FeedPool(CAPACITY, 24), FeedPool(CAPACITY, 24)
    pools[0].at(width).fill_rows(
        rows + 5,
        past + rows,
        np.minimum(past + rows + 1, past + count),
        np.where(rows < count, -2, 0),
        past,
    )
    feeds, line = pools[1].at(width), line_rows(count, streams, width)
    feeds.ids[0, : rows.size] = rows + 5
    feeds.pad_ids(rows.size)
    feeds.place_line(line, past)
    expected, found = (_values(pool, width) for pool in pools)
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)
    assert line.wanted.tolist() == [[*range(count - 1, count + streams)]]


def test_branch_rows_with_padding_that_no_row_sees() -> None:
    pool = FeedPool(CAPACITY, 100)
    feeds = pool.at(4)
    feeds.fill_rows(np.arange(4), np.arange(4), np.full(4, 30), np.arange(4), 9)  # stale
    feeds.fill_rows(np.array([7, 8]), np.array([12, 13]), np.array([11, 12]), np.array([0, 5]), 20)
    found = _values(pool, 4)
    assert found["input_ids"][0, :2].tolist() == [7, 8]
    assert found["position_ids"][0, :2].tolist() == [12, 13]
    assert found["row_visible"].tolist() == [11, 12, 11, 11]
    assert found["row_branch"].tolist() == [0, 5, -2, -2]
    assert found["past_length"].tolist() == [20]


@pytest.mark.parametrize(
    ("widths", "rows", "room", "expected"),
    [
        (None, 7, 50, (7, 7)),
        ((1, 4, 16), 9, 50, (9, 16)),
        ((1, 4, 16), 7, 50, (4, 4)),  # two passes of 4 rather than one of 16
        ((1, 64), 2, 100, (1, 1)),
        ((1, 64), 3, 100, (3, 64)),
        ((1, 4, 8), 8, 50, (8, 8)),
        ((1, 4, 16), 20, 50, (16, 16)),
        ((1, 4, 16), 9, 15, (4, 4)),  # padding must not run past the cache
        ((1, 4, 16), 3, 2, (1, 1)),
    ],
)
def test_chunks_fit_widths_and_room(
    widths: tuple[int, ...] | None, rows: int, room: int, expected: tuple[int, int]
) -> None:
    assert chunk_width(widths, rows, room) == expected


def test_widths_are_the_least_that_hold_the_rows() -> None:
    assert [fit_width((1, 4, 8), rows) for rows in (1, 2, 4, 5, 9)] == [1, 4, 4, 8, 8]
    assert fit_width(None, 5) == 5
