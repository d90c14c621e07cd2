"""Ternary codes in lanes: ten to a 16-bit half of a word, 1.6 bits each, decoded by multiplications alone.

A half holds the fraction v / 3^10, v = c0 3^9 + c1 3^8 + ... + c9, as ceil(2^16 v / 3^10): times 3 its integer part is c0, and what is
left is the fraction of c1, ..., c9. Rounding up errs by less than 2^-16 < 3^-10, so that no digit changes. Digits of the two halves of a
word are a pair of neighbouring codes.

A chunk is 64 codes, 32 pairs: thirty in three words and two more in a word that five chunks share. Five chunks lie as

    the shared word | three words of the first chunk | ... | three words of the fifth

and a last piece of fewer has its shared word, too: a row of C chunks takes 3 C + ceil(C / 5) words.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

TRITS = 10  # of a half
WORDS = 3  # of a chunk alone
SHARING = 5  # chunks that share a word
CHUNK = 64

_POWERS = 3 ** np.arange(TRITS - 1, -1, -1, dtype=np.uint32)


def word_count(chunks: int) -> int:
    """Words of a row of so many chunks."""
    return WORDS * chunks + -(-chunks // SHARING)


def place_of(chunks: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The word and the digit of each pair of a row: [32 chunks] each."""
    chunk, pair = np.divmod(np.arange(chunks * CHUNK // 2), CHUNK // 2)
    own = pair < WORDS * TRITS
    word = chunk // SHARING * (WORDS * SHARING + 1) + np.where(own, 1 + chunk % SHARING * WORDS + pair // TRITS, 0)
    digit = np.where(own, pair % TRITS, chunk % SHARING * 2 + pair - WORDS * TRITS)
    return word, digit


def pack(codes: NDArray[np.generic]) -> NDArray[np.uint32]:
    """Codes [..., 64 chunks] of 0, 1 and 2 -> words [..., word_count(chunks)]."""
    chunks = codes.shape[-1] // CHUNK
    digits = np.zeros((*codes.shape[:-1], word_count(chunks), TRITS, 2), np.uint32)
    digits[..., *place_of(chunks), :] = codes.reshape(*codes.shape[:-1], -1, 2)
    value = (digits * _POWERS[:, None]).sum(-2, dtype=np.uint32)
    halves = ((value.astype(np.uint64) << 16) + 3**TRITS - 1) // 3**TRITS
    words: NDArray[np.uint32] = (halves[..., 0] | halves[..., 1] << 16).astype(np.uint32)
    return words


def unpack(words: NDArray[np.generic], chunks: int) -> NDArray[np.uint8]:
    """The inverse of `pack`."""
    halves = np.stack([words.astype(np.uint32) & 0xFFFF, words.astype(np.uint32) >> 16], -1)[..., None, :]  # [..., words, 1, 2]
    digits = ((halves * 3 ** np.arange(TRITS, dtype=np.uint32)[:, None]) & 0xFFFF) * 3 >> 16
    return digits[..., *place_of(chunks), :].reshape(*words.shape[:-1], -1).astype(np.uint8)
