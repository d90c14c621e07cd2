"""Binary weights {-s, s} in groups: `binary_g<group>` or `binary_channel`, one bit a weight and a float16 scale s a group.

    value = (code - 1) * scale,   code 0 or 2

The codes are those of ternary weights without the one in the middle, so that whatever computes with codes and zero points need not know.
Stored is a bit a code, 1 for 2, low bits first, each group padded to whole bytes. (`int1_*` is another format: {-s, 0}, as its symmetric
zero point is a code.)
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from moec.runtime.formats.int import GROUPS, IntFormat

NAMES = [*(f"binary_g{size}" for size in GROUPS), "binary_channel"]


@dataclass(frozen=True)
class BinaryFormat(IntFormat):
    """Codes of two values, neither of which is zero.

    >>> BinaryFormat(64).nbytes((1, 128)), BinaryFormat(0).nbytes((1, 128))
    (20, 18)
    """

    bits: int = field(default=1, init=False)
    symmetric: bool = field(default=True, init=False)

    @property
    def name(self) -> str:
        return f"binary_g{self.group}" if self.group else "binary_channel"

    @property
    def step(self) -> int:
        return 2

    def _pack(self, codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return super()._pack(codes >> np.uint8(1))

    def _unpack(self, packed: NDArray[np.generic], k: int) -> NDArray[np.uint8]:
        return super()._unpack(packed, k) << np.uint8(1)


_NAME = re.compile(r"binary_(?:g([1-9]\d*)|channel)")


def parse(name: str) -> BinaryFormat | None:
    """The format of this name, or None."""
    match = _NAME.fullmatch(name)
    return BinaryFormat(int(match[1] or 0)) if match else None
