"""What the exit layer's state tells a draft that is fed by it: the feature channel's host side. Pure; numpy alone."""

from __future__ import annotations

import numpy as np

from mirror.runtime.records import Floats, Ints


class FeatureStore:
    """The exit layer's state at every position of a context.

    The row of the token at position p is fed with the state at p - 1: that of the row which the token
    was chosen from.
    """

    def __init__(self, capacity: int, hidden: int, dtype: str) -> None:
        """Make room for `capacity` positions of `hidden` numbers."""
        self._states = np.zeros((capacity, hidden), dtype)
        self._hidden = hidden

    def put(self, start: int, states: Floats) -> None:
        """Take the states `[n, hidden]` at positions `start..`."""
        self._states[start : start + states.shape[0]] = states

    def at(self, positions: Ints, fed: int | Ints, width: int) -> tuple[Floats, Floats]:
        """Return the features of some rows, padded to a pass's width.

        Args:
            positions: int64 [rows], the position of each row's token.
            fed: the last position whose row has a feature; one for all, or int64 [rows].

        Returns:
            `features` [1, width, hidden] and `feature_rows` float32 [width].
        """
        has = (positions >= 1) & (positions <= fed)
        features = np.zeros((1, width, self._hidden), self._states.dtype)
        features[0, : positions.size][has] = self._states[positions[has] - 1]
        rows = np.zeros(width, np.float32)
        rows[: positions.size] = has
        return features, rows
