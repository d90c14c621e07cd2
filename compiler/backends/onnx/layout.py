"""How a weight in an integer format lies in the files: the layout of ONNX's block-quantised operators.

    codes [N, K]  ->  weight: uint8 [N, blocks * block * bits / 8], the codes of a row low bits first, padded to whole blocks
    scale [N, G]  ->  scale: float16 [N, G], as it is; the graph widens it to float32 and repeats it for the blocks of a group
    zero  [N, G]  ->  zero: uint8 [N, bytes of a row's blocks], only where zero points differ from the operators' default

The operators know 2, 4 and 8 bits; codes of other widths are stored in the next wider container, symmetric ones moved so that the
operators' default zero point is theirs: the values are the same to the last bit, at the price of the container's bytes. So are ternary
and binary weights, whose container has 2 bits.
`MatMulNBits` computes quickly in float32 only with 4-bit weights. For float activations 8-bit codes are therefore mostly split
into two 4-bit halves that lie one after the other along K, which costs no bytes:

    x . (code - zero) * s  =  [x, x] . [(code / 16 - zero / 16) * 16 s,  (code % 16 - zero % 16) * s]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from moec.compiler.backends.base import StoredArray
from moec.compiler.packed import Quantized
from moec.runtime.formats.int import IntFormat

A = TypeVar("A", bound=np.generic)

MAX_BLOCK = 128
MIN_BLOCK = 16


def common_block(fmt: IntFormat, k: int, whole: bool = False) -> int:
    """A block (a power of two) of which every group of a row of k is a multiple; 0 if there is none of at least 16.

    >>> common_block(IntFormat(4, 64), 256), common_block(IntFormat(4, 128), 192), common_block(IntFormat(4, 40), 160)
    (64, 64, 0)

    Args:
        whole: blocks must also divide k.
    """
    size = fmt.group_size(k)
    multiple = MAX_BLOCK if size >= k else gcd(size, MAX_BLOCK)
    block = gcd(multiple, k)
    if not whole and block < 2 * MIN_BLOCK:
        block = 2 * MIN_BLOCK if size >= k else multiple
    return block if block >= MIN_BLOCK else 0


def container(bits: int) -> int:
    """The narrowest width of at least `bits` bits that the operators know."""
    return next(width for width in (2, 4, 8) if width >= bits)


@dataclass(frozen=True)
class IntLayout:
    """The layout of one [N, K] weight.

    Args:
        fmt: the weight's format.
        n, k: its shape.
        bits: width of a stored code.
        block: weights of a stored block. 0: the codes are bytes, and the graph dequantises them with elementwise operators.
        split: 8-bit codes are stored as two 4-bit halves.
        signed: codes are stored as signed numbers (two's complement), as DequantizeLinear takes them without zero points.
        interleave: rows n and n + N/2 become neighbours.
    """

    fmt: IntFormat
    n: int
    k: int
    bits: int
    block: int
    split: bool = False
    signed: bool = False
    interleave: bool = False

    @property
    def groups(self) -> int:
        return self.fmt.groups(self.k)

    @property
    def blocks(self) -> int:
        return -(-self.k // self.block) if self.block else self.groups

    @property
    def padded_k(self) -> int:
        return self.blocks * self.block if self.block else self.k

    @property
    def shift(self) -> int:
        """What is added to the codes of a symmetric format so that the container's middle is their zero point."""
        return (1 << (self.bits - 1)) - self.fmt.middle if self.fmt.symmetric else 0

    @property
    def has_zero(self) -> bool:
        return not self.fmt.symmetric

    @property
    def group_of_block(self) -> NDArray[np.int64]:
        """The group to which each block belongs."""
        if not self.block:
            return np.arange(self.groups)
        return np.arange(self.blocks) * self.block // self.fmt.group_size(self.k)

    def arrays(self) -> dict[str, StoredArray]:
        """The stored arrays."""
        row = self.padded_k * self.bits // 8 if self.block else self.k
        arrays = {"weight": StoredArray("uint8", (self.n, row)), "scale": StoredArray("float16", (self.n, self.groups))}
        if self.has_zero:
            arrays["zero"] = StoredArray("uint8", self._zero_shape)
        return arrays

    @property
    def _zero_shape(self) -> tuple[int, ...]:
        if not self.block:
            return (self.n, self.groups)
        if self.signed:  # one packed array, without padding at the end of a row
            return (-(-self.n * self.blocks * self.bits // 8),)
        return (self.n, -(-self.blocks * self.bits // 8))  # split: two halves a block of 4 bits each, so 8 bits as well

    def store(self, packed: Quantized) -> dict[str, NDArray[np.generic]]:
        """The stored arrays of a weight."""
        scale = packed.scale.astype(np.float16)
        codes = packed.codes + np.uint8(self.shift)
        zero = packed.zero
        if self.interleave:
            codes, scale, zero = interleaved(codes), interleaved(scale), interleaved(zero)
        arrays: dict[str, NDArray[np.generic]] = {"weight": self._pack(codes), "scale": np.ascontiguousarray(scale)}
        if self.has_zero:
            arrays["zero"] = self._pack_zero(zero[:, self.group_of_block])
        return arrays

    def restore(self, arrays: Mapping[str, NDArray[np.generic]]) -> Quantized:
        """The weight of stored arrays."""
        codes = self._unpack(arrays["weight"].astype(np.uint8)) - np.uint8(self.shift)
        scale = arrays["scale"].astype(np.float16)
        if self.has_zero:
            first = np.searchsorted(self.group_of_block, np.arange(self.groups))
            zero = self._unpack_zero(arrays["zero"].astype(np.uint8))[:, first]
        else:
            zero = np.full(scale.shape, self.fmt.middle, np.uint8)
        if self.interleave:
            codes, scale, zero = separated(codes), separated(scale), separated(zero)
        return Quantized(codes, scale, zero)

    def _pack(self, codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if not self.block:
            return np.ascontiguousarray(codes)
        codes = np.pad(codes, ((0, 0), (0, self.padded_k - self.k)))
        if self.split:
            return pack(np.concatenate([codes >> np.uint8(4), codes & np.uint8(15)], axis=1), 4)
        return pack(codes ^ np.uint8(self._sign), self.bits)

    def _unpack(self, weight: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if not self.block:
            return weight
        if self.split:
            both = unpack(weight, 4)
            return (both[:, : self.padded_k] << np.uint8(4) | both[:, self.padded_k :])[:, : self.k]
        return unpack(weight, self.bits)[:, : self.k] ^ np.uint8(self._sign)

    @property
    def _sign(self) -> int:
        return 1 << (self.bits - 1) if self.signed else 0

    def _pack_zero(self, zero: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if not self.block:
            return np.ascontiguousarray(zero)
        if self.split:  # the zero points of both halves
            return pack(np.concatenate([zero >> np.uint8(4), zero & np.uint8(15)], axis=1), 4)
        zero = zero ^ np.uint8(self._sign)
        return pack(zero.reshape(1, -1), self.bits)[0] if self.signed else pack(zero, self.bits)

    def _unpack_zero(self, stored: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if not self.block:
            return stored
        if self.split:
            both = unpack(stored, 4)
            return both[:, : self.blocks] << np.uint8(4) | both[:, self.blocks :]
        if self.signed:
            return unpack(stored[None], self.bits)[0, : self.n * self.blocks].reshape(self.n, -1) ^ np.uint8(self._sign)
        return unpack(stored, self.bits)[:, : self.blocks]


def pack(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Codes [N, m] of 2, 4 or 8 bits -> bytes [N, ceil(m * bits / 8)], low bits first."""
    each = 8 // bits
    codes = np.pad(codes, ((0, 0), (0, -codes.shape[1] % each)))
    packed = np.ascontiguousarray(codes[:, 0::each])
    for i in range(1, each):
        packed |= codes[:, i::each] << np.uint8(bits * i)
    return packed


def unpack(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """The inverse of `pack`, up to the codes that fill the last byte."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return (packed[:, :, None] >> shifts & np.uint8((1 << bits) - 1)).reshape(packed.shape[0], -1)


def interleaved(rows: NDArray[A]) -> NDArray[A]:
    """Rows 0 .. 2n-1 as 0, n, 1, n + 1, ..."""
    return np.ascontiguousarray(rows.reshape(2, rows.shape[0] // 2, *rows.shape[1:]).swapaxes(0, 1)).reshape(rows.shape)


def separated(rows: NDArray[A]) -> NDArray[A]:
    """The inverse of `interleaved`."""
    return np.ascontiguousarray(rows.reshape(rows.shape[0] // 2, 2, *rows.shape[1:]).swapaxes(0, 1)).reshape(rows.shape)
