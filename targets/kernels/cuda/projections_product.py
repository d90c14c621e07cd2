"""Products of tiles of packed rows with a staged row: of integer codes in fixed point, of bfloat16 with two terms of bfloat16."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from tvm.tirx.script import builder as T

from moec.targets.kernels.cuda import fixed_point
from moec.targets.kernels.cuda.dequantize import dequantize
from moec.targets.kernels.cuda.emit import Buffer, Expr, at, const, local, store, when
from moec.targets.kernels.cuda.intrinsics import mma, widen
from moec.targets.kernels.cuda.layout import COLUMN_WORDS, FragmentLayout
from moec.targets.kernels.cuda.loads import read_words
from moec.targets.kernels.cuda.projections_row import BF16_TERMS, StagedRow
from moec.targets.kernels.cuda.stream import STEPS
from moec.targets.kernels.cuda.warp import warp_down

Activations = Any
"""What `activations` returns."""


class Part(NamedTuple):
    """A block of a tile: a lane's words, where its scales and zero points begin, and which tile and block of a round it is."""

    words: Expr
    side: int
    tile: int
    block: int


class Products(Protocol):
    """Products of a kind of weights with a staged row."""

    def activations(self, block: Expr, missing: Expr | None) -> Activations:
        """The B fragments of a block of the warp's columns, zeros where it is missing."""
        ...

    def add(self, parts: Sequence[Part], activations: Mapping[int, Activations], sums: Buffer, sides: Buffer, zeros: Buffer | None) -> None:
        """sums[tile, half] += the products of some parts, which take turns."""
        ...

    def total(self, value: Expr) -> Expr:
        """A sum, in the lanes that have the first columns of B."""
        ...


def clear(buffer: Buffer, count: int) -> None:
    """Set registers to zero."""
    for i in range(count):
        store(buffer, const(0, str(buffer.dtype)), i)


class Bfloat16:
    """Weights of bfloat16, or fp8 as such; the two terms of the row are the first two columns of B."""

    def __init__(self, layout: FragmentLayout, row: StagedRow, lane: Expr) -> None:
        self._layout, self._row = layout, row
        self._from = T.Bind(T.min(lane // 4, BF16_TERMS - 1) * COLUMN_WORDS + lane % 4 * 4)

    def activations(self, block: Expr, missing: Expr | None) -> Buffer:
        found = local(16, "uint32")
        place = T.Bind(self._row.place(block) + self._from)
        for j in range(4):
            read_words(at(found, 4 * j), at(self._row.staged, place + j * 16))
        if missing is not None:
            with when(missing):
                clear(found, 16)
        return found

    def add(self, parts: Sequence[Part], activations: Mapping[int, Buffer], sums: Buffer, sides: Buffer, zeros: Buffer | None) -> None:
        del zeros
        found, a = local(4 * len(parts), "float32"), local(4 * len(parts), "uint32")
        clear(found, 4 * len(parts))
        nothing = const(0, "uint32")
        for step in range(STEPS):
            for n, part in enumerate(parts):
                dequantize(self._layout, at(a, 4 * n), part.words, step, (nothing, nothing))
                b, first = activations[part.block], 2 * step
                mma(at(found, 4 * n), at(a, 4 * n), b[first], b[first + 1])
        for n, part in enumerate(parts):
            for half in range(2):
                place, value = 2 * part.tile + half, found[4 * n + 2 * half] + found[4 * n + 2 * half + 1]
                if self._layout.fp8 is not None:
                    value = value * T.reinterpret("float32", sides[part.side + half])
                store(sums, sums[place] + value, place)

    def total(self, value: Expr) -> Expr:
        return value


class _Staged(NamedTuple):
    """B registers, the sums of each group of them in a lane's two columns, and what the columns count."""

    b: Buffer
    sums: Buffer
    factors: tuple[Expr, Expr]


class FixedPoint:
    """Integer codes; the three bytes of the row are the first three columns of B, so that lanes t = 0 and 1 have them."""

    def __init__(self, layout: FragmentLayout, row: StagedRow, lane: Expr) -> None:
        assert layout.integer is not None
        self._layout, self._row, self._bits = layout, row, layout.integer.bits
        self._middle = const(layout.integer.levels // 2, "int32")
        self._steps = fixed_point.group_steps(self._bits, layout.block_groups)
        self._from = T.Bind((T.min(lane // 4, fixed_point.TERMS - 1) * 4 + lane % 4) * fixed_point.REGISTERS)
        self._columns = [T.Bind(fixed_point.weight_of_column(lane % 4, which)) for which in range(2)]

    def activations(self, block: Expr, missing: Expr | None) -> _Staged:
        b = local(fixed_point.REGISTERS, "uint32")
        place = T.Bind(self._row.place(block))
        for half in range(2):
            read_words(at(b, 4 * half), at(self._row.staged, place + self._from + 4 * half))
        if missing is not None:
            with when(missing):
                clear(b, fixed_point.REGISTERS)
        scale = T.Bind(T.reinterpret("float32", self._row.staged[place + fixed_point.SCALE]))
        sums, ones = local(4 * len(self._steps), "int32"), local(4, "uint32")
        clear(sums, 4 * len(self._steps))
        for i in range(4):
            store(ones, const(0x01010101, "uint32"), i)
        for group, steps in enumerate(self._steps):
            for n, first, second in steps:
                fixed_point.product(at(sums, 4 * group), at(ones, 0), *self._b(b, n, first, second))
        return _Staged(b, sums, (T.Bind(self._columns[0] * scale), T.Bind(self._columns[1] * scale)))

    @staticmethod
    def _b(b: Buffer, n: int, first: int, second: int) -> tuple[Expr, Expr]:
        return fixed_point.only(b[2 * n], first), fixed_point.only(b[2 * n + 1], second)

    def add(self, parts: Sequence[Part], activations: Mapping[int, _Staged], sums: Buffer, sides: Buffer, zeros: Buffer | None) -> None:
        found, a, scales = local(4 * len(parts), "int32"), local(4 * len(parts), "uint32"), local(2, "float32")
        for group, steps in enumerate(self._steps):
            clear(found, 4 * len(parts))
            for n, first, second in steps:
                for m, part in enumerate(parts):
                    fixed_point.codes(self._bits, at(a, 4 * m), part.words, n)
                    fixed_point.product(at(found, 4 * m), at(a, 4 * m), *self._b(activations[part.block].b, n, first, second))
            for m, part in enumerate(parts):
                staged = activations[part.block]
                widen(at(scales, 0), sides[part.side + group])
                for half in range(2):
                    zero = self._middle if zeros is None else T.cast(zeros[2 * (part.side + group) + half], "int32")
                    values = [
                        T.cast(found[4 * m + 2 * half + c] - zero * staged.sums[4 * group + c], "float32") * staged.factors[c]
                        for c in range(2)
                    ]
                    place = 2 * part.tile + half
                    store(sums, sums[place] + (values[0] + values[1]) * scales[half], place)

    def total(self, value: Expr) -> Expr:
        kept = T.Bind(value)
        return T.Bind(kept + warp_down(kept, 1))
