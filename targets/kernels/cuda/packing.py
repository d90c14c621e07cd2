"""How the codes of a lane lie in words, so that few operations make bfloat16 pairs of them.

A lane has 16 pairs of a row's block, in `bits` words. A pair's codes are at the same bits of the low and of the high half of a word: so
one logical operation of three inputs, `(word >> shift & mask) | magic`, makes two bfloat16 numbers 2 ** (7 - p) + code, whose mantissas
have the codes from bit p on. A shift serves all pairs that lie within 7 bits. Codes of 3 bits are 5 pairs a word, and the three bits of
the last pair are those that are left in three words. Codes of 5 to 7 bits are cut into planes of 4, 2 and 1 bits; one of 8 bits has its
last bit apart from the mantissa.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

PAIRS = 16
MANTISSA = 7  # bits of bfloat16's

Scalar = TypeVar("Scalar", bound=np.generic)


@dataclass(frozen=True)
class Field:
    """Some bits of a pair of codes.

    Args:
        word: of the row's.
        shift: by which the word is shifted right (left if negative) before these bits are taken.
        at: the first of these bits after that, in each half.
        width: how many they are.
        start: which bit of the codes the first one is.
    """

    word: int
    shift: int
    at: int
    width: int
    start: int = 0

    @property
    def mask(self) -> int:
        """Of both halves, after the shift."""
        return (((1 << self.width) - 1) << self.at) * 0x10001


@cache
def packing(bits: int) -> tuple[tuple[Field, ...], ...]:
    """The fields of each of a lane's 16 pairs; all of a pair have the same `at - start`.

    >>> packing(4)[5], packing(3)[15]
    ((Field(word=1, shift=4, at=0, width=4, start=0),), (Field(word=0, shift=12, at=3, width=1, start=0), Field(word=1, \
shift=11, at=4, width=1, start=1), Field(word=2, shift=10, at=5, width=1, start=2)))
    """
    if bits == 3:
        last = (12, 11, 10)  # so that what is left of the words comes to neighbouring bits
        places = ((0, 0), (0, 3), (6, 0), (6, 3))
        whole = [(Field(k, *(places[q] if q < 4 else (last[k], 12 - last[k])), 3),) for k in range(3) for q in range(5)]
        return (*whole, tuple(Field(k, last[k], 15 - last[k], 1, k) for k in range(3)))
    if bits in (1, 2, 4, 8):
        return tuple((_regular(bits, i),) for i in range(PAIRS))
    found, first, start = [()] * PAIRS, 0, 0  # type: list[tuple[Field, ...]], int, int
    for width in (4, 2, 1):
        if bits & width:
            per = PAIRS // width
            found = [(*f, Field(first + i // per, i % per * width - start, start, width, start)) for i, f in enumerate(found)]
            first, start = first + width, start + width
    return tuple(found)


def _regular(bits: int, pair: int) -> Field:
    """Codes side by side, as many to a shift as fit into the mantissa."""
    per, together = PAIRS // bits, max(1, MANTISSA // bits)
    place = pair % per
    return Field(pair // per, place // together * together * bits, place % together * bits, bits)


@cache
def vectors(bits: int) -> tuple[tuple[int, int], ...]:
    """(first, count) of the words of a lane's two rows that it loads together: 4, and at last 2."""
    return tuple((first, min(4, 2 * bits - first)) for first in range(0, 2 * bits, 4))


def pack(lanes: NDArray[np.generic], bits: int) -> NDArray[np.uint32]:
    """Codes [..., 2 rows, 32 lanes, 32] -> words [..., 64 bits], as a warp loads them."""
    pairs = lanes.astype(np.uint32).reshape(*lanes.shape[:-1], PAIRS, 2)
    words = np.zeros((*lanes.shape[:-1], bits), np.uint32)
    for i, fields in enumerate(packing(bits)):
        for field in fields:
            part = (pairs[..., i, :] >> np.uint32(field.start)) & np.uint32((1 << field.width) - 1)
            first = field.shift + field.at
            words[..., field.word] |= (part[..., 0] << np.uint32(first)) | (part[..., 1] << np.uint32(first + 16))
    own = np.moveaxis(words, -3, -2).reshape(*lanes.shape[:-3], 32, 2 * bits)
    return np.concatenate([own[..., f : f + n].reshape(*lanes.shape[:-3], 32 * n) for f, n in vectors(bits)], -1)


def unpack(words: NDArray[np.unsignedinteger[Any]], bits: int) -> NDArray[np.uint8]:
    """The inverse of `pack`."""
    lead = words.shape[:-1]
    own = np.concatenate([words[..., 32 * f : 32 * (f + n)].reshape(*lead, 32, n) for f, n in vectors(bits)], -1)
    rows = np.moveaxis(own.reshape(*lead, 32, 2, bits), -2, -3)
    codes = np.zeros((*lead, 2, 32, PAIRS, 2), np.uint8)
    for i, fields in enumerate(packing(bits)):
        for field in fields:
            for half in range(2):
                part = (rows[..., field.word] >> np.uint32(field.shift + field.at + 16 * half)) & np.uint32((1 << field.width) - 1)
                codes[..., i, half] |= (part << np.uint32(field.start)).astype(np.uint8)
    return codes.reshape(*lead, 2, 32, 2 * PAIRS)
