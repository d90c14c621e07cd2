"""The fragment layout: how a weight [..., N, K] lies in memory for the CUDA kernels.

Rows are cut into tiles of 16 and columns into blocks of 128, and a block lies in the order in which the 32 lanes of a warp hold it as
operand A of `mma.m16n8k16` and of `wgmma.m64nNk16`: lane 4 g + t has rows g and g + 8, and of each row the columns
32 j + 16 s + 8 h + 2 t + o (j < 4, s, h, o < 2), in this order. So a warp reads a block with whole, aligned, contiguous 16-byte
loads and hands it to the tensor cores without passing it through shared memory (PTX ISA, "Matrix Fragments for mma.m16n8k16").

Floating-point formats keep `values` uint16 [..., N/16, K/128, 2048]: for each j and each of the two rows, 8 values of every lane.

Integer formats keep `codes` uint32 [..., N/16, K/128, 64 * bits], `scale` float16 [..., N/16, S, 8, B, 2] and, where asymmetric, `zero`
uint8 of the same shape: B = 128 / G groups of a block (1 where G >= 128), S blocks of scales, for rows g and g + 8 together. A lane has
`bits` words of each of its two rows; `packing` says which bits of which word a code is. Ternary codes are those of 2 bits.

fp8 formats keep their codes like those of 8 bits, and `scale` float32: [..., N/16, 1, 8, 1, 2], as integers do, of `fp8_channel`, and
[..., N/16, K/128, 2], for rows g and for rows g + 8 of a tile, of `fp8_block128`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray

from moec.runtime.errors import MoecError
from moec.runtime.formats import Scales, get_format
from moec.runtime.formats.fp8 import Fp8Format
from moec.runtime.formats.int import IntFormat
from moec.targets.kernels.cuda.packing import pack, unpack

ROWS = 16  # of a tile
BLOCK = 128  # columns of a block
PADDING = 16  # words after a column of activations: neighbours are 64 bytes apart in the banks of shared memory
COLUMN_WORDS = BLOCK // 2 + PADDING  # of a column of a block
FLOATS = ("bf16",)

Scalar = TypeVar("Scalar", bound=np.generic)

Arrays = Mapping[str, NDArray[np.generic]]


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def blocks_ahead(columns: int) -> int:
    """The most blocks of so many columns of activations that a warp has under way: a power of two."""
    return next((ahead for ahead, most in ((4, 4), (2, 8)) if columns <= most), 1)


@dataclass(frozen=True)
class FragmentLayout:
    """The fragment layout of a weight [n, k] in a format such as `int4_g64`, `int3_channel_asym`, `bf16`.

    Raises:
        MoecError: there is no kernel for the format, or k is no multiple of 8.
    """

    n: int
    k: int
    format: str

    in_fragments: ClassVar[bool] = True
    """Whether the kernels of the tensor cores read it."""

    def __post_init__(self) -> None:
        integer = self.integer
        if self.coded is None and self.format not in FLOATS:
            raise MoecError(
                f"no CUDA kernel for weight format {self.format!r}: expected int<bits>_..., fp8_... or one of {', '.join(FLOATS)}"
            )
        if integer is not None and integer.step != 1:
            raise MoecError(f"no CUDA kernel for {self.format}: its codes have a step of {integer.step}; choose ternary_... or int2_...")
        if integer is not None and integer.group and BLOCK % integer.group and integer.group % BLOCK:
            raise MoecError(f"no CUDA kernel for groups of {integer.group}: expected a divisor or a multiple of {BLOCK}")
        if self.k % 8:
            raise MoecError(f"no CUDA kernel for rows of {self.k} weights: expected a multiple of 8")

    @property
    def integer(self) -> IntFormat | None:
        """The integer format, None for floating point."""
        found = get_format(self.format)
        return found if isinstance(found, IntFormat) else None

    @property
    def fp8(self) -> Fp8Format | None:
        """The format, if it is one of 8-bit floating point."""
        found = get_format(self.format)
        return found if isinstance(found, Fp8Format) else None

    @property
    def coded(self) -> IntFormat | Fp8Format | None:
        """The format, if it has codes and scales."""
        return self.integer or self.fp8

    @property
    def bits(self) -> int:
        """Bits of a number."""
        return self.integer.bits if self.integer else 8 if self.fp8 else 16

    @property
    def tiles(self) -> int:
        """Tiles of 16 rows."""
        return ceil_div(self.n, ROWS)

    @property
    def blocks(self) -> int:
        """Blocks of 128 columns."""
        return ceil_div(self.k, BLOCK)

    @property
    def groups(self) -> int:
        """Quantisation groups of a row (1 for bf16)."""
        return self.coded.groups(self.k) if self.coded else 1

    @property
    def per_row(self) -> bool:
        """Whether the format has one scale a row, however long that is."""
        return not (self.integer.group if self.integer else self.fp8.block if self.fp8 else 0)

    @property
    def block_groups(self) -> int:
        """Groups that a block has."""
        return max(1, BLOCK // self.integer.group) if self.integer and self.integer.group else 1

    @property
    def scale_span(self) -> int:
        """Blocks that a block of scales serves."""
        if self.per_row:
            return self.blocks
        return max(1, self.integer.group // BLOCK) if self.integer else 1

    @property
    def scale_blocks(self) -> int:
        """Blocks of scales of a row."""
        return ceil_div(self.blocks, self.scale_span)

    @property
    def block_words(self) -> int:
        """32-bit words of a block of 16 rows."""
        return 64 * self.bits

    @property
    def units(self) -> int:
        """Parts of a block that a lane holds at a time where registers are scarce."""
        return {16: 4, 8: 2}.get(self.bits, 1)

    @property
    def side_words(self) -> int:
        """Words that a lane has of the scales of a block: two float16 for each group, or two float32; of bf16 one that is not used."""
        return 2 if self.fp8 else self.block_groups

    @property
    def unit_words(self) -> int:
        """Words that a lane has of a unit."""
        return self.block_words // 32 // self.units

    def arrays(self, *lead: int) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of every array, with leading axes such as [E]."""
        shape = (*lead, self.tiles, self.blocks)
        if self.coded is None:
            return {"values": ((*shape, 2 * self.block_words), "uint16")}
        side = (*lead, self.tiles, self.scale_blocks, 8, self.block_groups, 2)
        if self.fp8 is not None:
            scales = (*shape, 2) if self.fp8.block else side
            return {"codes": ((*shape, self.block_words), "uint32"), "scale": (scales, "float32")}
        found = {"codes": ((*shape, self.block_words), "uint32"), "scale": (side, "float16")}
        return found if self.coded.symmetric else {**found, "zero": (side, "uint8")}

    def nbytes(self, *lead: int) -> int:
        """Bytes of all arrays."""
        return sum(prod(shape) * np.dtype(dtype).itemsize for shape, dtype in self.arrays(*lead).values())

    def tile(self, codes: NDArray[np.uint8], scale: Scales, zero: NDArray[np.uint8] | None = None) -> dict[str, NDArray[np.generic]]:
        """Codes [..., N, K], scales and (asymmetric) zero points [..., N, groups] -> the arrays of a format with codes."""
        integer = self.integer
        assert self.coded is not None
        assert (codes.shape[-2:], scale.shape[-2:]) == ((self.n, self.k), (self.n, self.groups))
        lanes = _to_lanes(padded(codes, self.tiles * ROWS, self.blocks * BLOCK))
        kind = np.float16 if integer else np.float32
        sides = self._half_tiles(scale) if self.fp8 and self.fp8.block else self._sides(scale.astype(kind))
        arrays = {"codes": pack(lanes, self.bits), "scale": sides}
        if not self.coded.symmetric:
            assert zero is not None
            arrays["zero"] = self._sides(zero)
        return arrays

    def untile(self, arrays: Arrays) -> tuple[NDArray[np.uint8], Scales, NDArray[np.uint8]]:
        """The inverse of `tile` (symmetric: zero points are constant)."""
        integer = self.integer
        codes = unpack(arrays["codes"].view(np.uint32), self.bits)
        rows = np.ascontiguousarray(_from_lanes(codes)[..., : self.n, : self.k])
        if integer is None:
            wide = self._of_half_tiles(arrays["scale"]) if self.fp8 and self.fp8.block else self._rows(arrays["scale"])
            return rows, wide.astype(np.float32), np.zeros(wide.shape, np.uint8)
        scale = self._rows(arrays["scale"])
        zero = np.full_like(scale, integer.levels // 2, np.uint8) if integer.symmetric else self._rows(arrays["zero"])
        return rows, scale.astype(np.float16), zero.astype(np.uint8)

    def tile_values(self, values: NDArray[np.generic]) -> dict[str, NDArray[np.generic]]:
        """Values [..., N, K] as bits -> the array of a floating-point format."""
        lanes = _to_lanes(padded(values.view(np.uint16), self.tiles * ROWS, self.blocks * BLOCK))  # [..., 2, 32, 4 j, 8]
        chunks = np.moveaxis(lanes.reshape(*lanes.shape[:-1], 4, 8), -2, -4)  # [..., 4 j, 2, 32, 8]
        return {"values": np.ascontiguousarray(chunks).reshape(*chunks.shape[:-4], 2 * self.block_words)}

    def untile_values(self, arrays: Arrays) -> NDArray[np.generic]:
        """The inverse of `tile_values`."""
        values = arrays["values"]
        lanes = np.moveaxis(values.reshape(*values.shape[:-1], 4, 2, 32, 8), -4, -2)
        rows = _from_lanes(np.ascontiguousarray(lanes).reshape(*lanes.shape[:-2], 32))
        return np.ascontiguousarray(rows[..., : self.n, : self.k])

    def _sides(self, x: NDArray[np.generic]) -> NDArray[np.generic]:
        """[..., N, groups] -> [..., tiles, S, 8, B, 2], zeros added."""
        count = self.scale_blocks * self.block_groups
        x = padded(x, self.tiles * ROWS, count).reshape(*x.shape[:-2], self.tiles, 2, 8, self.scale_blocks, self.block_groups)
        return np.ascontiguousarray(np.moveaxis(np.moveaxis(x, -4, -1), -4, -3))

    def _rows(self, x: NDArray[np.generic]) -> NDArray[np.generic]:
        """The inverse of `_sides`."""
        x = np.moveaxis(np.moveaxis(x, -3, -4), -1, -4)
        return np.ascontiguousarray(x.reshape(*x.shape[:-5], self.tiles * ROWS, -1)[..., : self.n, : self.groups])

    def _half_tiles(self, scale: Scales) -> NDArray[np.generic]:
        """Scales [..., N, groups] that 8 neighbouring rows share -> float32 [..., tiles, blocks, 2]; rows without one have 0."""
        rows = padded(scale.astype(np.float32), self.tiles * ROWS, self.blocks).reshape(*scale.shape[:-2], self.tiles, 2, 8, -1)
        first = rows[..., :1, :]
        if not ((rows == first) | (rows == 0)).all():
            raise MoecError(
                f"no CUDA kernel for {self.format} of {self.n} rows: rows of one half of a tile have scales of different blocks; "
                "experts need a multiple of 8 neurons, or choose fp8_channel"
            )
        return np.ascontiguousarray(np.moveaxis(first[..., 0, :], -1, -2))

    def _of_half_tiles(self, x: NDArray[np.generic]) -> NDArray[np.generic]:
        """The inverse of `_half_tiles`."""
        rows = np.repeat(np.moveaxis(x, -1, -2), 8, axis=-2).reshape(*x.shape[:-3], self.tiles * ROWS, self.blocks)
        return np.ascontiguousarray(rows[..., : self.n, : self.groups])


def padded(x: NDArray[Scalar], rows: int, columns: int) -> NDArray[Scalar]:
    """[..., n, m] -> [..., rows, columns], zeros added."""
    widths = [(0, 0)] * (x.ndim - 2) + [(0, rows - x.shape[-2]), (0, columns - x.shape[-1])]
    return np.pad(x, widths) if any(high for _, high in widths) else x


def _to_lanes(x: NDArray[Scalar]) -> NDArray[Scalar]:
    """Rows [..., tiles 16, blocks 128] -> [..., tiles, blocks, 2, 32 lanes, 32]: the numbers of a row that each lane has, in order."""
    *lead, n, k = x.shape
    parts = x.reshape(*lead, n // ROWS, 2, 8, k // BLOCK, 8, 2, 4, 2)  # tile, half, g, block, (j, s), h, t, o
    count = len(lead)
    order = [*range(count), *(count + i for i in (0, 3, 1, 2, 6, 4, 5, 7))]  # tile, block, half, g, t, (j, s), h, o
    return np.ascontiguousarray(parts.transpose(order)).reshape(*lead, n // ROWS, k // BLOCK, 2, 32, 32)


def _from_lanes(x: NDArray[Scalar]) -> NDArray[Scalar]:
    """The inverse of `_to_lanes`."""
    *lead, tiles, blocks, _, _, _ = x.shape
    parts = x.reshape(*lead, tiles, blocks, 2, 8, 4, 8, 2, 2)
    count = len(lead)
    order = [*range(count), *(count + i for i in (0, 2, 3, 1, 5, 6, 4, 7))]
    return parts.transpose(order).reshape(*lead, tiles * ROWS, blocks * BLOCK)
