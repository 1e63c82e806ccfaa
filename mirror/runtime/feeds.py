"""The catalogue inputs of a pass, computed from a cursor. Buffers are allocated once per width.

Knows integers only. A graph takes what it declares out of these; see `docs/bundle.md`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mirror.runtime.records import Ints
from mirror.targets.base import Tensor

NO_BRANCH = -1  # in slot_branch: a slot of the trunk, or an empty one
TRUNK_ROW = -2  # in row_branch: a row that sees no branch


@dataclass(frozen=True)
class LineRows:
    """The rows of a pass over one line of tokens and streams behind it, relative to the first free slot.

    Attributes:
        positions: int64 [width], padding included, as in the others.
        visible: int32 [width].
        branches: int32 [width]; streams are a branch of their own, 0.
        wanted: int64 [1, 1 + streams], the last token's row and the streams'.
    """

    positions: Ints
    visible: NDArray[np.int32]
    branches: NDArray[np.int32]
    wanted: Ints


@functools.cache
def line_rows(count: int, streams: int, width: int) -> LineRows:
    """Return the rows of `count` tokens and some streams, padded to a width."""
    rows = np.arange(width)
    real = rows < count + streams
    return LineRows(
        positions=np.where(real, rows, 0),
        visible=np.where(real, np.minimum(rows + 1, count), 1).astype(np.int32),
        branches=np.where((rows >= count) & real, 0, TRUNK_ROW).astype(np.int32),
        wanted=np.arange(count - 1, count + streams)[None],
    )


class PassFeeds:
    """The inputs of one width, refilled by every pass.

    Attributes:
        tensors: inputs by catalogue name; the arrays are this object's own.
    """

    def __init__(self, width: int, max_positions: int, slot_branch: np.ndarray[tuple[int], np.dtype[np.int32]]) -> None:
        self.width = width
        self._last_position = max_positions - 1
        self._rows = np.arange(width, dtype=np.int64)
        self._ids = np.zeros((1, width), np.int64)
        self._positions = np.zeros((1, width), np.int64)
        self._seqlens = np.zeros(1, np.int32)
        self._total = np.zeros((), np.int32)
        self._past = np.zeros(1, np.int32)
        self._visible = np.zeros(width, np.int32)
        self._branch = np.full(width, TRUNK_ROW, np.int32)
        self.tensors: dict[str, Tensor] = {
            "input_ids": self._ids,
            "position_ids": self._positions,
            "seqlens_k": self._seqlens,
            "total_sequence_length": self._total,
            "past_length": self._past,
            "row_visible": self._visible,
            "row_branch": self._branch,
            "slot_branch": slot_branch,
        }

    @property
    def ids(self) -> Ints:
        """The ids, int64 `[1, width]`; this object's own."""
        return self._ids

    def fill_causal(self, tokens: Ints, past_length: int) -> None:
        """Fill for tokens `[n]`, n <= width, that follow `past_length` slots in one line.

        Rows from n on are padding: they repeat the last token after the real ones, where no real
        row sees them, and their slots are written again before anything reads them.
        """
        self._fill_ids(tokens)
        np.add(self._rows, past_length, out=self._positions[0])
        np.minimum(self._positions, self._last_position, out=self._positions)
        np.add(self._rows, past_length + 1, out=self._visible, casting="unsafe")
        self._branch[:] = TRUNK_ROW
        self._fill_cursor(past_length)

    def fill_rows(self, tokens: Ints, positions: Ints, visible: Ints, branches: Ints, past_length: int) -> None:
        """Fill for rows of any branches, each `[n]`, n <= width, appended after `past_length` slots.

        Padding rows carry no branch and see the trunk of row 0, so no row sees them.
        """
        self._fill_ids(tokens)
        self.place_rows(positions, visible, branches, past_length)

    def place_rows(self, positions: Ints, visible: Ints, branches: Ints, past_length: int) -> None:
        """Fill as `fill_rows` does, all but the ids."""
        count = positions.shape[0]
        self._positions[0, :count] = positions
        self._positions[0, count:] = positions[0]
        np.minimum(self._positions, self._last_position, out=self._positions)
        self._visible[:count] = visible
        self._visible[count:] = visible[0]
        self._branch[:count] = branches
        self._branch[count:] = TRUNK_ROW
        self._fill_cursor(past_length)

    def place_line(self, line: LineRows, past_length: int) -> None:
        """Fill for one line and its streams, appended after `past_length` slots, all but the ids."""
        np.add(line.positions, past_length, out=self._positions[0])
        np.minimum(self._positions, self._last_position, out=self._positions)
        np.add(line.visible, past_length, out=self._visible, casting="unsafe")
        self._branch[:] = line.branches
        self._fill_cursor(past_length)

    def pad_ids(self, count: int) -> None:
        """Let padding repeat the last of the first `count` ids."""
        self._ids[0, count:] = self._ids[0, count - 1]

    def _fill_ids(self, tokens: Ints) -> None:
        self._ids[0, : tokens.shape[0]] = tokens
        self.pad_ids(tokens.shape[0])

    def _fill_cursor(self, past_length: int) -> None:
        self._past[0] = past_length
        self._seqlens[0] = past_length + self.width - 1
        self._total[...] = past_length + self.width


class FeedPool:
    """The feeds of every width that one model has been run at.

    Args:
        capacity: slots of its cache.
        max_positions: positions that it knows.
    """

    def __init__(self, capacity: int, max_positions: int) -> None:
        self.slot_branch = np.full(capacity, NO_BRANCH, np.int32)
        self._max_positions = max_positions
        self._feeds: dict[int, PassFeeds] = {}

    def at(self, width: int) -> PassFeeds:
        """Return the feeds of a width."""
        feeds = self._feeds.get(width)
        if feeds is None:
            feeds = self._feeds[width] = PassFeeds(width, self._max_positions, self.slot_branch)
        return feeds


def fit_width(widths: Sequence[int] | None, rows: int) -> int:
    """Return the least width that a segment takes and that holds some rows; the widest if none does."""
    if widths is None:
        return rows
    return next((width for width in widths if width >= rows), widths[-1])


def chunk_width(widths: Sequence[int] | None, rows: int, room: int) -> tuple[int, int]:
    """Return (rows, width) of the next pass over some waiting rows.

    A pass that would be mostly padding gives way to two narrower ones, and so does one whose padding
    would run past the `room` slots that the cache still has.
    """
    width = fit_width(widths, rows)
    for narrower in reversed([candidate for candidate in widths or () if candidate < width]):
        mostly_padding = 2 * rows <= width and rows <= 2 * narrower
        if width <= room and not mostly_padding:
            break
        width = narrower
    return min(rows, width), width
