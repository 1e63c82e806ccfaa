"""Noise that depends only on (seed, position, token): Philox4x32-10, counted, never stepped.

`docs/sampling.md` specifies every bit of it for hosts in other languages. Pure; numpy alone.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]
F64 = NDArray[np.float64]

# Token words of the two draws that belong to no token.
TAIL_TOKEN = 0xFFFFFFFF
PICK_TOKEN = 0xFFFFFFFE

_MULTIPLIER_0 = np.uint64(0xD2511F53)
_MULTIPLIER_1 = np.uint64(0xCD9E8D57)
_WEYL_0 = 0x9E3779B9
_WEYL_1 = 0xBB67AE85
_MASK = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)
_12 = np.uint64(12)
_ROUNDS = 10


def philox(counter: U64, key: tuple[int, int]) -> U64:
    """Return Philox4x32-10 of some counters.

    Args:
        counter: uint64 [4, n], each below 2**32, words c0..c3.
        key: two 32-bit words.

    Returns:
        uint64 [4, n], each below 2**32.

    Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011).
    """
    c0, c1, c2, c3 = counter
    for index in range(_ROUNDS):
        k0 = np.uint64((key[0] + index * _WEYL_0) & 0xFFFFFFFF)
        k1 = np.uint64((key[1] + index * _WEYL_1) & 0xFFFFFFFF)
        # Products of two 32-bit words fit 64 bits exactly.
        product_0 = c0 * _MULTIPLIER_0
        product_1 = c2 * _MULTIPLIER_1
        c0, c1, c2, c3 = (
            (product_1 >> _32) ^ c1 ^ k0,
            product_1 & _MASK,
            (product_0 >> _32) ^ c3 ^ k1,
            product_0 & _MASK,
        )
    return np.stack([c0, c1, c2, c3])


def uniforms(seed: int, position: int | NDArray[np.int64], tokens: NDArray[np.integer]) -> F64:
    """Return one uniform in (0, 1) for each token at a position.

    Args:
        seed: 0 <= seed < 2**64, the Philox key, low word first.
        position: absolute position of the token being drawn; one for all, or int64 [n].
        tokens: [n] token words, 0 <= token < 2**32.

    Returns:
        float64 [n], each (k + 0.5) / 2**52 for an integer k: never 0, never 1.
    """
    counter = np.zeros((4, tokens.shape[0]), np.uint64)
    counter[0] = tokens
    counter[1] = position & 0xFFFFFFFF
    counter[2] = position >> 32
    words = philox(counter, (seed & 0xFFFFFFFF, seed >> 32))
    bits = (words[1] << _32) | words[0]
    result: F64 = ((bits >> _12).astype(np.float64) + 0.5) * 2.0**-52
    return result


def gumbel(uniform: F64) -> F64:
    """Return standard Gumbel variates, float64, from uniforms in (0, 1)."""
    result: F64 = -np.log(-np.log(uniform))
    return result
