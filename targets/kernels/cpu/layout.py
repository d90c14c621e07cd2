"""The lane layout: how a weight [..., N, K] lies in memory for the CPU kernels.

Rows are cut into tiles of 16, one row per 32-bit lane of a 512-bit vector (narrower vectors take the same tile in parts), and
every array is contiguous along K within a tile, so that a kernel reads one stream per tile. N is padded to whole tiles, K to
whole groups and whole chunks of 32 (ternary: 64). Padded codes, scales and values are zero.

Floating-point formats keep `values` [..., N/16, K, 16]; fp8 keeps `scale` float32 [..., N/16, groups, 16] besides, for every row.

The format `zero` keeps nothing.

Integer formats keep `codes` uint32 [..., N/16, K/32, bits, 16], `scale` float16 [..., N/16, groups, 16] and, where asymmetric,
`zero` uint8 of the same shape. A code of `bits` bits is cut into planes of 8, 4, 2 or 1 bits, low bits in the widest plane
(3 = 2 + 1), and a chunk of 32 codes takes p words of a plane of p bits, 32 / p consecutive codes a word. Within a word the codes
come in fours, the j-th four at bit p * j of the word's bytes, in byte order 0, 2, 1, 3: so `(word >> p * j) & 0x000m000m` is a
pair of neighbouring codes as 16-bit integers, and `& 0x0m0m0m0m` is four codes as bytes. Binary codes, 0 and 2, have a plane of their
second bit alone.

Ternary formats keep `codes` uint32 [..., N/16, words, 16] as `trits.py` has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from moec.runtime.errors import MoecError
from moec.runtime.formats import Scales, get_format
from moec.runtime.formats.fp8 import Fp8Format
from moec.runtime.formats.int import IntFormat
from moec.runtime.formats.ternary import TernaryFormat
from moec.targets.kernels.cpu import trits

LANES = 16  # rows of a tile
CHUNK = 32  # codes of a row that are stored together where they are cut into planes
BYTE_ORDER = (0, 2, 1, 3)  # which of four consecutive codes each byte of a word holds (its own inverse)
FLOAT_STORAGE = {"f32": "float32", "f16": "float16", "bf16": "uint16", "fp8_block128": "uint8", "fp8_channel": "uint8"}

Arrays = Mapping[str, NDArray[np.generic]]


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def planes(fmt: IntFormat) -> list[tuple[int, int, int]]:
    """(width, first bit, first word) of the planes that a code is cut into.

    >>> planes(IntFormat(4, 0)), planes(IntFormat(7, 0))
    ([(4, 0, 0)], [(4, 0, 0), (2, 4, 4), (1, 6, 6)])
    """
    found = []
    word = 0
    for width in (8, 4, 2, 1):
        if fmt.bits & width:
            found.append((width, word + fmt.step // 2, word))
            word += width
    return found


@dataclass(frozen=True)
class LaneLayout:
    """The lane layout of a weight [n, k] in a format such as `int4_g64`, `int3_channel_asym`, `bf16`."""

    n: int
    k: int
    format: str

    def __post_init__(self) -> None:
        integer = self.integer
        if integer is None and self.format not in (*FLOAT_STORAGE, "zero"):
            raise MoecError(
                f"no CPU kernel for weight format {self.format!r}: expected int<bits>_..., ternary_..., binary_... "
                f"or one of {list(FLOAT_STORAGE)}"
            )
        if integer is not None and self.groups > 1 and integer.group % CHUNK:
            raise MoecError(f"no CPU kernel for groups of {integer.group}: expected a multiple of {CHUNK}")

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
    def ternary(self) -> bool:
        """Whether codes are stored in base 3."""
        return isinstance(self.integer, TernaryFormat)

    @property
    def chunk(self) -> int:
        """Codes of a row that are stored together."""
        return trits.CHUNK if self.ternary else CHUNK

    @property
    def tiles(self) -> int:
        """Tiles of 16 rows."""
        return ceil_div(self.n, LANES)

    @property
    def groups(self) -> int:
        """Quantisation groups of a row (1 for floating point without scales)."""
        coded = self.integer or self.fp8
        return coded.groups(self.k) if coded else 1

    @property
    def group(self) -> int:
        """Weights of a group in the layout, padding included."""
        if self.integer is None:
            return self.k
        return ceil_div(self.k, self.chunk) * self.chunk if self.groups == 1 else self.integer.group

    @property
    def padded_k(self) -> int:
        """Weights of a row in the layout."""
        if self.integer is None:
            return self.k
        return ceil_div(self.group * self.groups, self.chunk) * self.chunk

    def arrays(self, *lead: int) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of every array, with leading axes such as [E, parts]."""
        if self.format == "zero":
            return {}
        if self.integer is None:
            values = {"values": ((*lead, self.tiles, self.k, LANES), FLOAT_STORAGE[self.format])}
            return {**values, "scale": ((*lead, self.tiles, self.groups, LANES), "float32")} if self.fp8 else values
        side = (*lead, self.tiles, self.groups, LANES)
        chunks = self.padded_k // self.chunk
        words = (trits.word_count(chunks),) if self.ternary else (chunks, self.integer.bits)
        found = {"codes": ((*lead, self.tiles, *words, LANES), "uint32"), "scale": (side, "float16")}
        return found if self.integer.symmetric else {**found, "zero": (side, "uint8")}

    def nbytes(self, *lead: int) -> int:
        """Bytes of all arrays."""
        return sum(prod(shape) * np.dtype(dtype).itemsize for shape, dtype in self.arrays(*lead).values())

    def tile(self, codes: NDArray[np.uint8], scale: Scales, zero: NDArray[np.uint8] | None = None) -> dict[str, NDArray[np.generic]]:
        """Codes [..., N, K], scales and (asymmetric) zero points [..., N, groups] -> the arrays of a format that has them."""
        integer = self.integer
        if self.fp8:
            assert scale.shape[-2:] == (self.n, self.groups)
            padded = _padded(scale.astype(np.float32), self.tiles * LANES, self.groups)
            return {**self.tile_values(codes), "scale": _lanes_last(padded)}
        assert integer is not None
        assert (codes.shape[-2:], scale.shape[-2:]) == ((self.n, self.k), (self.n, self.groups))
        rows = self.tiles * LANES
        padded = _padded(codes, rows, self.padded_k)
        arrays = {
            "codes": _lanes_last(trits.pack(padded)) if self.ternary else _pack(padded, integer),
            "scale": _lanes_last(_padded(scale.astype(np.float16), rows, self.groups)),
        }
        if not integer.symmetric:
            assert zero is not None
            assert zero.shape == scale.shape
            arrays["zero"] = _lanes_last(_padded(zero, rows, self.groups))
        return arrays

    def untile(self, arrays: Arrays) -> tuple[NDArray[np.uint8], Scales, NDArray[np.uint8]]:
        """The inverse of `tile` (symmetric: zero points are constant)."""
        integer = self.integer
        if self.fp8:
            scale = _rows_first(arrays["scale"], self.n)
            return self.untile_values(arrays).astype(np.uint8), scale.astype(np.float32), np.zeros(scale.shape, np.uint8)
        assert integer is not None
        if self.ternary:
            codes = trits.unpack(_rows_first(arrays["codes"], self.n), self.padded_k // self.chunk)[..., : self.k]
        else:
            codes = _unpack(arrays["codes"], integer)[..., : self.n, : self.k]
        scale = _rows_first(arrays["scale"], self.n)
        zero = np.full_like(scale, integer.middle, np.uint8) if integer.symmetric else _rows_first(arrays["zero"], self.n)
        return np.ascontiguousarray(codes), scale.astype(np.float16), zero.astype(np.uint8)

    def tile_values(self, values: NDArray[np.generic]) -> dict[str, NDArray[np.generic]]:
        """Values [..., N, K] in the format's storage (bf16: the bits as uint16) -> the array of a floating-point format."""
        assert self.integer is None
        assert values.shape[-2:] == (self.n, self.k)
        return {"values": _lanes_last(_padded(values.view(FLOAT_STORAGE[self.format]), self.tiles * LANES, self.k))}

    def untile_values(self, arrays: Arrays) -> NDArray[np.generic]:
        """The inverse of `tile_values`."""
        return _rows_first(arrays["values"], self.n)


def _padded(x: NDArray[np.generic], rows: int, columns: int) -> NDArray[np.generic]:
    """[..., n, m] -> [..., rows, columns], zeros added."""
    widths = [(0, 0)] * (x.ndim - 2) + [(0, rows - x.shape[-2]), (0, columns - x.shape[-1])]
    return np.pad(x, widths) if any(high for _, high in widths) else x


def _lanes_last(x: NDArray[np.generic]) -> NDArray[np.generic]:
    """[..., tiles * 16, m] -> [..., tiles, m, 16]."""
    tiled = x.reshape(*x.shape[:-2], x.shape[-2] // LANES, LANES, x.shape[-1])
    return np.ascontiguousarray(tiled.swapaxes(-1, -2))


def _rows_first(x: NDArray[np.generic], n: int) -> NDArray[np.generic]:
    """[..., tiles, m, 16] -> [..., n, m]: the inverse of `_lanes_last`, padding dropped."""
    rows = x.swapaxes(-1, -2)
    return np.ascontiguousarray(rows.reshape(*rows.shape[:-3], -1, rows.shape[-1])[..., :n, :])


def _pack(codes: NDArray[np.generic], fmt: IntFormat) -> NDArray[np.uint32]:
    """Codes [..., tiles * 16, K] in planes -> words [..., tiles, chunks, bits, 16]."""
    chunks = codes.reshape(*codes.shape[:-2], -1, LANES, codes.shape[-1] // CHUNK, CHUNK)
    words = np.concatenate([_pack_plane(chunks, width, start) for width, start, _ in planes(fmt)], axis=-1)
    return np.ascontiguousarray(np.moveaxis(words, -3, -1))


def _unpack(stored: NDArray[np.generic], fmt: IntFormat) -> NDArray[np.uint8]:
    """The inverse of `_pack`."""
    words = np.moveaxis(stored, -1, -3)  # [..., tiles, 16, chunks, bits]
    chunks = np.zeros((*words.shape[:-1], CHUNK), np.uint8)
    for width, start, word in planes(fmt):
        chunks |= _unpack_plane(np.ascontiguousarray(words[..., word : word + width]), width, start)
    return chunks.reshape(*chunks.shape[:-4], chunks.shape[-4] * LANES, -1)


def _pack_plane(chunks: NDArray[np.generic], width: int, start: int) -> NDArray[np.uint32]:
    """Bits start..start+width of codes [..., 32] -> words [..., width]."""
    bits = (chunks.astype(np.uint8, copy=False) >> np.uint8(start)) & np.uint8((1 << width) - 1)
    fours = bits.reshape(*bits.shape[:-1], width, 8 // width, 4)
    packed = fours[..., 0, :].copy()
    for j in range(1, 8 // width):
        packed |= fours[..., j, :] << np.uint8(width * j)
    return np.ascontiguousarray(packed[..., BYTE_ORDER]).view("<u4")[..., 0]


def _unpack_plane(words: NDArray[np.generic], width: int, start: int) -> NDArray[np.uint8]:
    """Words [..., width] -> codes [..., 32] with bits start..start+width set: the inverse of `_pack_plane`."""
    packed = words[..., None].view(np.uint8)[..., BYTE_ORDER]
    shifts = (np.arange(8 // width, dtype=np.uint8) * width)[:, None]
    bits = (packed[..., None, :] >> shifts) & np.uint8((1 << width) - 1)
    return (bits << np.uint8(start)).reshape(*words.shape[:-1], CHUNK)
