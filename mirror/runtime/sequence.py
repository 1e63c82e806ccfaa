"""The committed tokens of one context, and how many of them the target's cache holds."""

from __future__ import annotations

import numpy as np

from mirror.errors import CapacityError
from mirror.runtime.records import Ints


class Sequence:
    """Committed tokens, never taken back within a generation.

    Invariant: `0 <= cached <= length <= max_length`; between rounds `cached == length - 1`, since
    the last token is the first of the next window.

    Attributes:
        cached: target cache slots that hold this sequence's tokens.
    """

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self.cached = 0
        self._tokens = np.zeros(max_length, np.int64)
        self._length = 0

    def __len__(self) -> int:
        return self._length

    @property
    def tokens(self) -> Ints:
        """The committed tokens, int64 [length]; a view."""
        return self._tokens[: self._length]

    @property
    def room(self) -> int:
        """How many more tokens fit."""
        return self.max_length - self._length

    def begin(self, prompt: Ints, *, reuse: bool) -> int:
        """Replace the tokens by a prompt and return how many of its first ones the caches may keep.

        Args:
            reuse: keep the longest common beginning of what is cached and the prompt; the prompt's
                last token is always run again, for its logits.

        Raises:
            CapacityError: the prompt leaves no room for one more token.
        """
        count = prompt.shape[0]
        if count >= self.max_length:
            raise CapacityError(
                f"the prompt has {count} tokens and the cache holds {self.max_length}, of which one is for the "
                "answer; shorten the prompt or load the bundle with a larger max_length"
            )
        kept = min(self.cached, self._length, count - 1) if reuse else 0
        differs = np.flatnonzero(self._tokens[:kept] != prompt[:kept])
        self.cached = int(differs[0]) if differs.size else kept
        self._tokens[:count] = prompt
        self._length = count
        return self.cached

    def append(self, tokens: tuple[int, ...]) -> None:
        """Commit tokens; the caller has checked `room`."""
        end = self._length + len(tokens)
        self._tokens[self._length : end] = tokens
        self._length = end

    def settle(self) -> None:
        """Forget cache rows past the last token but one, as an ending in mid-window leaves them."""
        self.cached = min(self.cached, max(self._length - 1, 0))
