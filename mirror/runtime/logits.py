"""The logits of one pass, left on the device until someone asks for a row.

A pass over a window of a large vocabulary leaves megabytes of logits. Greedy choices need none of them where the
graph names each row's likeliest token; a draw needs one row, and rows past the first mismatch nobody reads.
"""

from __future__ import annotations

import math

import numpy as np

from mirror.runtime.records import Floats, Ints
from mirror.targets.base import DeviceTensor, Fetched, Tensor, to_host


class Logits:
    """What the target said after each wanted row of a pass; valid until its next pass.

    Args:
        logits: float32 [1, rows, vocab], on a device or in host memory.
        token_ids: int64 [1, rows], each row's likeliest token, the first of equals, -1 where its logit is no finite
            number; None where the graph names none.
    """

    def __init__(self, logits: Tensor, token_ids: Tensor | None = None) -> None:
        self._logits = logits
        self._token_ids = token_ids
        self._vocab_size = logits.shape[-1]
        self._rows: dict[int, Floats] = {}
        self._likeliest: Ints | None = None
        self._fetched: Fetched | None = None

    @property
    def unread(self) -> DeviceTensor | None:
        """The likeliest tokens where they are on a device, as `token_ids`; None where the host has or finds them."""
        return None if isinstance(self._token_ids, np.ndarray) else self._token_ids

    def fetch(self) -> None:
        """Start to bring the likeliest tokens to the host: the next pass may be launched then, and no row be read."""
        if (unread := self.unread) is not None:
            self._fetched = unread.fetch()

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

    def likeliest(self, index: int) -> int:
        """Return a row's likeliest token, the first of equals; -1 where its logit is no finite number."""
        if not isinstance(self._logits, np.ndarray) and self._token_ids is not None:
            return int(self._read_likeliest(self._token_ids)[index])
        row = self.row(index)
        token = int(np.argmax(row))
        return token if math.isfinite(row[token]) else -1

    def _read_likeliest(self, token_ids: Tensor) -> Ints:
        """Return each row's likeliest token, int64 [rows]; read once."""
        if self._likeliest is None:
            values = self._fetched() if self._fetched is not None else to_host(token_ids)
            self._likeliest = values[0]
        return self._likeliest
