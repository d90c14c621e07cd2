"""Ternary weights {-s, 0, s} in groups: `ternary_g<group>` or `ternary_channel`, 1.6 bits a weight and a float16 scale s a group.

    value = (code - 1) * scale,   code 0, 1 or 2

Five codes make a byte, c0 + 3 c1 + 9 c2 + 27 c3 + 81 c4. The codes of a row are one stream that takes no notice of groups: ceil(K / 5)
bytes, the last filled up with zeros. 3^5 = 243 of a byte's 256 values are used: log2(3) = 1.585 bits would be the least.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from moec.runtime.formats.int import GROUPS, IntFormat

NAMES = [*(f"ternary_g{size}" for size in GROUPS), "ternary_channel"]

PER_BYTE = 5
_POWERS = 3 ** np.arange(PER_BYTE, dtype=np.uint8)


@dataclass(frozen=True)
class TernaryFormat(IntFormat):
    """Codes of three values. `bits` is the width of a code that is stored by itself, as backends may.

    >>> TernaryFormat(64).nbytes((1, 128)), TernaryFormat(0).nbytes((1, 128))
    (30, 28)
    """

    bits: int = field(default=2, init=False)
    symmetric: bool = field(default=True, init=False)

    @property
    def name(self) -> str:
        return f"ternary_g{self.group}" if self.group else "ternary_channel"

    @property
    def levels(self) -> int:
        return 3

    def _row_bytes(self, k: int) -> int:
        return -(-k // PER_BYTE)

    def _pack(self, codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
        count = self._row_bytes(codes.shape[-1])
        padded = np.zeros((*codes.shape[:-1], count * PER_BYTE), np.uint8)
        padded[..., : codes.shape[-1]] = codes
        packed: NDArray[np.uint8] = (padded.reshape(*codes.shape[:-1], count, PER_BYTE) * _POWERS).sum(-1, dtype=np.uint8)
        return packed

    def _unpack(self, packed: NDArray[np.generic], k: int) -> NDArray[np.uint8]:
        digits = packed.view(np.uint8)[..., None] // _POWERS % np.uint8(3)
        return digits.reshape(*packed.shape[:-1], -1)[..., :k]


_NAME = re.compile(r"ternary_(?:g([1-9]\d*)|channel)")


def parse(name: str) -> TernaryFormat | None:
    """The format of this name, or None."""
    match = _NAME.fullmatch(name)
    return TernaryFormat(int(match[1] or 0)) if match else None
