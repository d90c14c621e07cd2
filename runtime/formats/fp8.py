"""Weights of 8-bit floating point with scales: `fp8_channel`, one scale a row, and `fp8_block128`, one for each 128 by 128 block.

    value = e4m3(code) * scale

A code is a sign, four bits of exponent (bias 7) and three of mantissa: OCP's E4M3 (https://arxiv.org/abs/2209.05433), which has no
infinities, reaches 448, and whose 0x7F and 0xFF are NaN. Scales are float32. Blocks are those of a matrix [N, K], as in the checkpoints of
DeepSeek-V3 (https://arxiv.org/abs/2412.19437); those at its end may be smaller.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from moec.runtime.formats import Arrays, Scales

NAMES = ["fp8_block128", "fp8_channel"]

LARGEST = 448.0
"""The largest number of E4M3."""

BLOCK = 128


def _table() -> NDArray[np.float32]:
    """What each code stands for, in float32."""
    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    size = np.where(exponent > 0, np.ldexp(8.0 + mantissa, exponent - 10), np.ldexp(1.0 * mantissa, -9))
    size = np.where(codes & 0x7F == 0x7F, np.nan, size)
    return np.where(codes & 0x80, -size, size).astype(np.float32)


E4M3 = _table()


@dataclass(frozen=True)
class Fp8Format:
    """E4M3 codes, with a scale a row (`block` 0) or for each block of `block` by `block`.

    >>> Fp8Format(128).nbytes((256, 130)), Fp8Format(0).nbytes((256, 130))
    (33296, 34304)
    """

    block: int
    symmetric: ClassVar[bool] = True
    """As integer formats have it: no zero points are stored."""

    @property
    def name(self) -> str:
        return f"fp8_block{self.block}" if self.block else "fp8_channel"

    def group_size(self, k: int) -> int:
        """Weights of a row that share a scale."""
        return min(self.block, k) if self.block else k

    def groups(self, k: int) -> int:
        """Scales of a row of k weights."""
        return -(-k // self.group_size(k))

    def scale_rows(self, n: int) -> int:
        """Rows of scales of a matrix of n rows."""
        return -(-n // self.block) if self.block else n

    def nbytes(self, shape: tuple[int, ...]) -> int:
        *lead, n, k = (1, *shape)
        return prod(lead) * (n * k + 4 * self.scale_rows(n) * self.groups(k))

    def pack(self, codes: NDArray[np.uint8], scale: Scales, zero: NDArray[np.uint8] | None = None) -> Arrays:  # noqa: ARG002
        """Codes [..., N, K] and scales [..., N, groups], the same for all rows of a block -> stored arrays; `zero` is not read."""
        rows = scale[..., :: self.block or 1, :] if scale.ndim > 1 else scale
        return {"codes": codes, "scale": np.ascontiguousarray(rows, dtype="<f4")}

    def codes(self, arrays: Arrays, shape: tuple[int, ...]) -> tuple[NDArray[np.uint8], Scales, NDArray[np.uint8]]:
        """Codes, scales [..., N, groups] and zero points, which are zero, of a packed weight: the inverse of `pack`."""
        *lead, n, k = (1, *shape)
        rows = arrays["scale"].reshape(*lead, self.scale_rows(n), self.groups(k)).astype(np.float32)
        spread = np.repeat(rows, self.block, axis=-2)[..., :n, :] if self.block else rows
        scale = spread.reshape(*shape[:-1], self.groups(k))
        return arrays["codes"].reshape(shape).view(np.uint8), scale, np.zeros(scale.shape, np.uint8)

    def dequantize(
        self, codes: NDArray[np.uint8], scale: Scales, zero: NDArray[np.uint8] | None = None  # noqa: ARG002
    ) -> NDArray[np.float32]:  # fmt: skip
        """e4m3(code) * scale in float32: [..., N, K]; `zero` is not read, integer formats have it."""
        k = codes.shape[-1]
        spread = np.repeat(scale.astype(np.float32), self.group_size(k), axis=-1)[..., :k]
        return E4M3[codes] * spread

    def unpack(self, arrays: Arrays, shape: tuple[int, ...]) -> NDArray[np.float32]:
        return self.dequantize(*self.codes(arrays, shape))


def parse(name: str) -> Fp8Format | None:
    """The format of this name, or None."""
    return Fp8Format(BLOCK if name == NAMES[0] else 0) if name in NAMES else None
