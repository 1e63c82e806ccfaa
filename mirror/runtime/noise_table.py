"""The target's noise for a draft on a device that only launches passes: rows of it, where the device can reach them.

A draft that is to guess draws adds the target's own noise to its scores. A device whose passes follow each other
without the host must do so itself, so the noise of each position is drawn ahead and lies in a table on the device, a
row for each position, in a ring.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mirror.bundle import NOISE_POSITIONS
from mirror.runtime.records import Ints
from mirror.runtime.sampling import CoupledNoise
from mirror.targets.base import RowTable, Tensor


class NoiseTable:
    """The noise of some positions, each in one row of a device's table."""

    def __init__(self, table: RowTable, tokens: Ints) -> None:
        """Take an empty table.

        Args:
            table: `NOISE_POSITIONS` rows of as many numbers as there are tokens.
            tokens: int64 [n], the token that each of the draft's scores is for.
        """
        self._table = table
        self._tokens = tokens
        self._held = np.full(NOISE_POSITIONS, -1, np.int64)  # the position whose noise each row holds
        self._noise: CoupledNoise | None = None
        self._inverse_temperature = np.ones(1, np.float32)

    def feeds(self, noise: CoupledNoise, positions: Ints) -> Mapping[str, Tensor]:
        """Return what a graph needs to add the noise to its scores.

        Args:
            positions: int64 [rows], the position of the token that each wanted row is for, as the noise counts; any
                `NOISE_POSITIONS` in a row hold them all.
        """
        self.draw(noise, positions)
        return {
            "noise": self._table.tensor,
            "noise_rows": positions % NOISE_POSITIONS,
            "inverse_temperature": self._inverse_temperature,
        }

    def draw(self, noise: CoupledNoise, positions: Ints) -> None:
        """Draw the noise of positions that the table lacks."""
        if noise != self._noise:
            self._table.wait()  # passes that read what is to be written over
            self._noise = noise
            self._held[:] = -1
            self._inverse_temperature[0] = 1.0 / noise.temperature
        for position in np.unique(positions).tolist():
            row = position % NOISE_POSITIONS
            if self._held[row] != position:
                self._table.write(row, noise.gumbel_at(position, self._tokens).astype(np.float32))
                self._held[row] = position
