"""Noise that depends only on (seed, position, token): Philox4x32-10, counted, never stepped.

`docs/sampling.md` specifies every bit of it for hosts in other languages. Pure; numpy alone.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

U32 = NDArray[np.uint32]
U64 = NDArray[np.uint64]
F64 = NDArray[np.float64]

# Token words of the two draws that belong to no token.
TAIL_TOKEN = 0xFFFFFFFF
PICK_TOKEN = 0xFFFFFFFE

_MULTIPLIER_0 = np.uint64(0xD2511F53)
_MULTIPLIER_1 = np.uint64(0xCD9E8D57)
_WEYL_0 = 0x9E3779B9
_WEYL_1 = 0xBB67AE85
_WORD = 0xFFFFFFFF
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
    c0, c1, c2, c3 = counter.astype(np.uint32)
    return np.stack(_rounds(c0, c1, c2, c3, key)).astype(np.uint64)


def _rounds(c0: U32, c1: U32, c2: U32, c3: U32, key: tuple[int, int]) -> tuple[U32, U32, U32, U32]:
    """Run all rounds over the words of some counters, uint32 [n] each, in place."""
    # A product of two 32-bit words fits 64 bits exactly; its halves are looked at where they are.
    product_0, product_1 = np.empty(c0.size, "<u8"), np.empty(c0.size, "<u8")
    low_0, high_0, low_1, high_1 = (
        product.view("<u4")[half::2] for product in (product_0, product_1) for half in (0, 1)
    )
    for index in range(_ROUNDS):
        np.multiply(c0, _MULTIPLIER_0, out=product_0)
        np.multiply(c2, _MULTIPLIER_1, out=product_1)
        np.bitwise_xor(high_1, c1, out=c0)
        np.bitwise_xor(high_0, c3, out=c2)
        c0 ^= np.uint32((key[0] + index * _WEYL_0) & _WORD)
        c2 ^= np.uint32((key[1] + index * _WEYL_1) & _WORD)
        c1[:], c3[:] = low_1, low_0
    return c0, c1, c2, c3


def uniforms(seed: int, position: int | NDArray[np.int64], tokens: NDArray[np.integer]) -> F64:
    """Return one uniform in (0, 1) for each token at a position.

    Args:
        seed: 0 <= seed < 2**64, the Philox key, low word first.
        position: absolute position of the token being drawn; one for all, or int64 [n].
        tokens: [n] token words, 0 <= token < 2**32.

    Returns:
        float64 [n], each (k + 0.5) / 2**52 for an integer k: never 0, never 1.
    """
    counter = np.zeros((4, tokens.size), np.uint32)
    counter[0] = tokens
    counter[1] = position & _WORD
    counter[2] = position >> 32
    c0, c1, c2, c3 = counter
    low, high, *_ = _rounds(c0, c1, c2, c3, (seed & _WORD, seed >> 32))
    bits = high.astype(np.uint64)
    bits <<= _32
    bits |= low
    bits >>= _12
    result: F64 = bits.astype(np.float64)
    result += 0.5
    result *= 2.0**-52
    return result


def gumbel(uniform: F64) -> F64:
    """Return standard Gumbel variates, float64, from uniforms in (0, 1)."""
    result: F64 = -np.log(-np.log(uniform))
    return result
