"""The few logits of a row that can matter to a choice, found in float32. Pure; numpy alone.

What a choice is made of is float64, and only its greatest parts count for much. Widening, sorting and summing a
whole vocabulary costs more than all the rest of a draw, so the rows are searched as they are. Everything here is a
superset or a bound: whoever uses it computes exactly from what is left, and gets what the whole row would give.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mirror.runtime.records import Floats, Ints

# More than float32 gets wrong in a sum of exponentials, as a share of it. An exponent is off by 1e-7 of itself, and
# those that count are no lower than the logarithm of the vocabulary; an exponential by 3e-7, a sum in pairs by 2e-6.
FLOAT32_SLACK = 1e-5
# Temperatures at which different logits divided by them still differ, and their exponentials are numbers.
_TAME = (1e-6, 1e6)
_BLOCK = 32
# Of the greater of two logits: closer ones may have equal scores in float64.
_CLOSE = 1e-6


@dataclass(frozen=True)
class Peaks:
    """A row of logits, and the greatest of each of its blocks.

    Attributes:
        logits: float32 [vocab], no NaN, the greatest finite.
        maxima: float32 [blocks], of up to `_BLOCK` logits each.
        temperature: what scores divide the logits by.
    """

    logits: Floats
    maxima: Floats
    temperature: float

    @property
    def greatest(self) -> np.float32:
        """The greatest logit."""
        return np.float32(self.maxima.max())

    def best(self, count: int) -> Ints | None:
        """Return ids, ascending, with all tokens among the `count` greatest scores, those that tie with the last too.

        None where it would be most of the row.
        """
        if self.maxima.size < 2 * count:
            return None
        return self._from(_least_of(self.maxima, count))

    def at_least(self, share: float) -> Ints | None:
        """Return ids, ascending, with all tokens that are at least `share` times as likely as the likeliest."""
        return self._from(self.greatest + self.temperature * np.log(share))

    def _from(self, logit: float) -> Ints | None:
        """Return ids with all tokens whose score is at least that of a logit; None if that is -inf."""
        if logit == -np.inf:
            return None
        close = _CLOSE * (abs(float(logit)) + abs(float(self.greatest)))
        return np.flatnonzero(self.logits >= np.nextafter(np.float32(logit - close), np.float32(-np.inf)))

    def mass(self) -> float:
        """Return the sum of all weights, `exp(score - greatest score)`, to within `FLOAT32_SLACK` of it."""
        scores = self._scores(self.logits)
        return float(np.exp(scores, out=scores).sum())

    def mass_below(self, logit: float) -> float:
        """Return a number that the weights of all tokens whose logit is at most this one don't add up to."""
        return (
            _BLOCK * float(np.exp(self._scores(np.minimum(self.maxima, np.float32(logit)))).sum()) * (1 + FLOAT32_SLACK)
        )

    def _scores(self, logits: Floats) -> Floats:
        """Return scores less the greatest, in float32."""
        scores: Floats = logits - self.greatest
        scores *= np.float32(1.0 / self.temperature)
        return scores


def find_peaks(logits: Floats, temperature: float) -> Peaks | None:
    """Return a row's peaks; None where its temperature is so extreme that float32 says nothing of the scores."""
    if not _TAME[0] <= temperature <= _TAME[1]:
        return None
    return Peaks(logits, _block_maxima(logits), temperature)


def least_of_best(values: NDArray[np.floating[Any]], count: int) -> float:
    """Return a number that at least `count` of some values reach, and not many more."""
    return _least_of(_block_maxima(values) if values.size >= 2 * _BLOCK * count else values, count)


def _least_of(maxima: NDArray[np.floating[Any]], count: int) -> float:
    """Return the `count`-th greatest maximum: as many values reach it, since each maximum is one of them."""
    return float(np.partition(maxima, maxima.size - count)[maxima.size - count])


def _block_maxima(values: NDArray[np.floating[Any]]) -> NDArray[Any]:
    """Return the greatest of each block, and the values past the last block."""
    blocks = values.size // _BLOCK
    whole = blocks * _BLOCK
    # Block j is every `blocks`-th value from the j-th on: maxima down columns take a twentieth of those along rows.
    maxima = values[:whole].reshape(_BLOCK, blocks).max(axis=0)
    return np.append(maxima, values[whole:])
