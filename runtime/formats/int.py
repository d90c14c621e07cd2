"""Integer weights in groups: `int<bits>_g<group>` or `int<bits>_channel`, symmetric unless the name ends in `_asym`.

A weight [..., N, K] is cut along K into groups of G (the last may be shorter; `channel` is one group a row). Each group has a
float16 scale and, where asymmetric, a zero point among the codes:

    value = (code - zero) * scale,   0 <= code < 2^bits,   zero = 2^(bits-1) where symmetric.

Codes of a row are stored as one bit stream, low bits first, each group padded to whole bytes; zero points likewise, a row at a time.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moec.runtime.formats import Arrays, Scales

GROUPS = (32, 64, 128)
NAMES = [f"int{b}_{g}{a}" for b in (2, 3, 4, 8) for g in (*(f"g{s}" for s in GROUPS), "channel") for a in ("", "_asym")]


def pack_bits(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Codes [..., n] below 2^bits -> bytes [..., ceil(n * bits / 8)], low bits first."""
    planes = (codes[..., None] >> np.arange(bits, dtype=np.uint8)) & 1
    return np.packbits(planes.reshape(*codes.shape[:-1], -1), axis=-1, bitorder="little")


def unpack_bits(packed: NDArray[np.generic], bits: int, count: int) -> NDArray[np.uint8]:
    """The first `count` codes of each row: the inverse of `pack_bits`."""
    planes = np.unpackbits(packed.view(np.uint8), axis=-1, bitorder="little", count=count * bits)
    weights = (1 << np.arange(bits)).astype(np.uint8)
    codes: NDArray[np.uint8] = (planes.reshape(*packed.shape[:-1], count, bits) * weights).sum(-1, dtype=np.uint8)
    return codes


@dataclass(frozen=True)
class IntFormat:
    """Codes of `bits` bits with a scale every `group` weights of a row (0: one scale a row).

    Formats of fewer values than their codes' bits could say (`ternary.py`, `binary.py`) are special cases.
    """

    bits: int
    group: int
    symmetric: bool = True

    @property
    def name(self) -> str:
        grouping = f"g{self.group}" if self.group else "channel"
        return f"int{self.bits}_{grouping}" + ("" if self.symmetric else "_asym")

    @property
    def levels(self) -> int:
        """How many codes there are."""
        return 1 << self.bits

    @property
    def step(self) -> int:
        """The distance of neighbouring codes."""
        return 1

    @property
    def top(self) -> int:
        """The largest code."""
        return (self.levels - 1) * self.step

    @property
    def middle(self) -> int:
        """The zero point of a symmetric format."""
        return (self.top + 1) // 2

    def group_size(self, k: int) -> int:
        """Weights of a full group in a row of k."""
        return min(self.group, k) if self.group else k

    def groups(self, k: int) -> int:
        """Groups in a row of k weights."""
        return -(-k // self.group_size(k))

    def _row_bytes(self, k: int) -> int:
        size = self.group_size(k)
        full, rest = divmod(k, size)
        return full * -(-size * self.bits // 8) + -(-rest * self.bits // 8)

    def nbytes(self, shape: tuple[int, ...]) -> int:
        *lead, k = shape
        rows, groups = int(np.prod(lead, dtype=np.int64)), self.groups(k)
        zeros = 0 if self.symmetric else -(-groups * self.bits // 8)
        return rows * (self._row_bytes(k) + 2 * groups + zeros)

    def pack(self, codes: NDArray[np.uint8], scale: Scales, zero: NDArray[np.uint8] | None = None) -> Arrays:
        """Codes [..., N, K], scales [..., N, groups] and (asymmetric) zero points [..., N, groups] -> stored arrays."""
        arrays = {"codes": self._pack(codes), "scale": scale.astype("<f2")}
        if not self.symmetric:
            assert zero is not None
            arrays["zero"] = pack_bits(zero, self.bits)
        return arrays

    def _pack(self, codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Codes [..., N, K] -> bytes [..., N, bytes of a row]."""
        k = codes.shape[-1]
        size = self.group_size(k)
        full = k // size * size
        packed = pack_bits(codes[..., :full].reshape(*codes.shape[:-1], full // size, size), self.bits)
        packed = packed.reshape(*codes.shape[:-1], -1)
        if full < k:
            packed = np.concatenate([packed, pack_bits(codes[..., full:], self.bits)], axis=-1)
        return packed

    def codes(self, arrays: Arrays, shape: tuple[int, ...]) -> tuple[NDArray[np.uint8], Scales, NDArray[np.uint8]]:
        """Codes, scales and zero points of a packed weight: the inverse of `pack` (symmetric: zero points are constant)."""
        *lead, k = shape
        groups = self.groups(k)
        body = self._unpack(arrays["codes"].reshape(*lead, -1), k)
        scale = arrays["scale"].reshape(*lead, groups).astype(np.float16)
        if self.symmetric:
            return body, scale, np.full(scale.shape, self.middle, np.uint8)
        return body, scale, unpack_bits(arrays["zero"].reshape(*lead, -1), self.bits, groups)

    def _unpack(self, packed: NDArray[np.generic], k: int) -> NDArray[np.uint8]:
        """The inverse of `_pack`: bytes [..., N, bytes of a row] -> codes [..., N, K]."""
        size, lead = self.group_size(k), packed.shape[:-1]
        full = k // size * size
        split = full // size * -(-size * self.bits // 8)
        body = unpack_bits(packed[..., :split].reshape(*lead, full // size, -1), self.bits, size).reshape(*lead, full)
        if full < k:
            body = np.concatenate([body, unpack_bits(packed[..., split:], self.bits, k - full)], axis=-1)
        return body

    def dequantize(self, codes: NDArray[np.uint8], scale: Scales, zero: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(codes - zero) * scale in float32, group by group: [..., N, K]."""
        k = codes.shape[-1]
        size = self.group_size(k)
        spread = [np.repeat(a.astype(np.float32), size, axis=-1)[..., :k] for a in (zero, scale)]
        return (codes.astype(np.float32) - spread[0]) * spread[1]

    def unpack(self, arrays: Arrays, shape: tuple[int, ...]) -> NDArray[np.float32]:
        return self.dequantize(*self.codes(arrays, shape))


_NAME = re.compile(r"int([1-8])_(?:g([1-9]\d*)|channel)(_asym)?")


def parse(name: str) -> IntFormat | None:
    """The format of this name, or None."""
    if (match := _NAME.fullmatch(name)) is None:
        return None
    bits, group, asymmetric = match.groups()
    return IntFormat(int(bits), int(group or 0), not asymmetric)
