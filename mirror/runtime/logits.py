"""The logits of one pass, left on the device until someone asks for a row.

A pass over a window of a large vocabulary leaves megabytes of logits. Greedy choices need none of them where the
graph names each row's likeliest token; a draw needs one row, and rows past the first mismatch nobody reads.
"""

from __future__ import annotations

import math

import numpy as np

from mirror.runtime.records import Floats, Ints
from mirror.targets.base import Tensor


class Logits:
    """What the target said after each wanted row of a pass; valid until its next pass.

    Args:
        logits: float32 [1, rows, vocab], on a device or in host memory.
        token_ids: int64 [1, rows], each row's likeliest token, the first of equals; None where the graph has none.
    """

    def __init__(self, logits: Tensor, token_ids: Tensor | None = None) -> None:
        self._logits = logits
        self._token_ids = token_ids
        self._vocab_size = logits.shape[-1]
        self._rows: dict[int, Floats] = {}
        self._likeliest: Ints | None = None

    def wait(self) -> None:
        """Wait until the pass has ended."""
        if isinstance(self._logits, np.ndarray):
            return
        if self._token_ids is None:
            self._logits.wait()
        else:
            self._read_likeliest(self._token_ids)  # waits, and is wanted next

    def row(self, index: int) -> Floats:
        """Return one row, float32 [vocab]: a view of host memory, or a copy that is made once."""
        if isinstance(self._logits, np.ndarray):
            values: Floats = self._logits[0, index]
            return values
        if index not in self._rows:
            self._rows[index] = self._logits.numpy_part(index * self._vocab_size, self._vocab_size)
        return self._rows[index]

    def likeliest(self, index: int) -> tuple[int, float]:
        """Return a row's likeliest token, the first of equals, and its logit.

        The logit is NaN or infinite where the row's greatest is, as far as the graph's own choice shows it.
        """
        if not isinstance(self._logits, np.ndarray) and self._token_ids is not None:
            token = int(self._read_likeliest(self._token_ids)[index])
            if 0 <= token < self._vocab_size:
                logit = float(self._logits.numpy_part(index * self._vocab_size + token, 1)[0])
                if math.isfinite(logit):
                    return token, logit
            # The graph compared numbers that are none; the row itself tells which.
        row = self.row(index)
        token = int(np.argmax(row))
        return token, float(row[token])

    def _read_likeliest(self, token_ids: Tensor) -> Ints:
        """Return each row's likeliest token, int64 [rows]; read once."""
        if self._likeliest is None:
            self._likeliest = (token_ids if isinstance(token_ids, np.ndarray) else token_ids.numpy())[0]
        return self._likeliest
