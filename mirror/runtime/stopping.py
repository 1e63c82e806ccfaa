"""When a text ends: decided on committed tokens only, one token at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection
from collections.abc import Sequence as TokenSequence

from mirror.runtime.records import FinishReason

# Takes committed tokens; returns how many count when a stop string was completed, else None.
StopText = Callable[[TokenSequence[int]], int | None]


class Stopping:
    """Cuts what a round commits at the first end: end token, stop string or limit."""

    def __init__(self, eos: Collection[int], limit: int, stop_text: StopText | None) -> None:
        self._eos = frozenset(eos)
        self._left = limit
        self._stop_text = stop_text

    @property
    def left(self) -> int:
        """How many more tokens may be committed."""
        return self._left

    def cut(self, tokens: tuple[int, ...]) -> tuple[tuple[int, ...], FinishReason | None]:
        """Return the tokens that count, and why the text ends with them, if it does."""
        kept, reason = tokens[: self._left], None
        if len(kept) == self._left:
            reason = FinishReason.LENGTH
        end = next((index for index, token in enumerate(kept) if token in self._eos), None)
        if end is not None:
            kept, reason = kept[: end + 1], FinishReason.STOP
        stopped = self._stop_text(kept) if self._stop_text is not None else None
        if stopped is not None:
            kept, reason = kept[:stopped], FinishReason.STOP
        self._left -= len(kept)
        return kept, reason
