"""Products of tiles of packed rows with staged rows: of integer codes in fixed point, of bfloat16 with two terms of bfloat16."""

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
from moec.targets.kernels.cuda.projections_columns import Columns
from moec.targets.kernels.cuda.projections_row import BF16_TERMS, Row
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
    """Products of a kind of weights with the staged rows."""

    terms: int
    """Of an activation."""

    def activations(self, block: Expr, missing: Expr | None) -> Activations:
        """The B fragments of a block of the warp's columns, zeros where it is missing."""
        ...

    def add(self, parts: Sequence[Part], activations: Mapping[int, Activations], sums: Buffer, sides: Buffer, zeros: Buffer | None) -> None:
        """sums[tile, half, token of the lane] += the products of some parts, which take turns."""
        ...

    def total(self, value: Expr) -> Expr:
        """A sum, in the lanes that have the first columns of a token."""
        ...


def clear(buffer: Buffer, count: int) -> None:
    """Set registers to zero."""
    for i in range(count):
        store(buffer, const(0, str(buffer.dtype)), i)


class Bfloat16:
    """Weights of bfloat16, or fp8 as such; a row is two terms of bfloat16."""

    terms = BF16_TERMS

    def __init__(self, layout: FragmentLayout, row: Row, lane: Expr, columns: Columns) -> None:
        self._layout, self._row, self._columns = layout, row, columns
        self._from = []
        for fragment in range(columns.fragments):
            token, index = columns.loaded(fragment, lane // 4)
            self._from.append(T.Bind(token * row.token_words + index * COLUMN_WORDS + lane % 4 * 4))

    def activations(self, block: Expr, missing: Expr | None) -> Buffer:
        found = local(16 * len(self._from), "uint32")
        for fragment, start in enumerate(self._from):
            place = T.Bind(self._row.place(block) + start)
            for j in range(4):
                read_words(at(found, 16 * fragment + 4 * j), at(self._row.staged, place + j * 16))
        if missing is not None:
            with when(missing):
                clear(found, 16 * len(self._from))
        return found

    def add(self, parts: Sequence[Part], activations: Mapping[int, Buffer], sums: Buffer, sides: Buffer, zeros: Buffer | None) -> None:
        del zeros
        columns, fragments = self._columns, self._columns.fragments
        found, a = local(4 * fragments * len(parts), "float32"), local(4 * len(parts), "uint32")
        clear(found, 4 * fragments * len(parts))
        nothing = const(0, "uint32")
        for step in range(STEPS):
            for n, part in enumerate(parts):
                dequantize(self._layout, at(a, 4 * n), part.words, step, (nothing, nothing))
                for fragment in range(fragments):
                    b, first = activations[part.block], 16 * fragment + 2 * step
                    mma(at(found, 4 * (n * fragments + fragment)), at(a, 4 * n), b[first], b[first + 1])
        for n, part in enumerate(parts):
            for half in range(2):
                for which in range(columns.own):
                    terms = [columns.place(which, index) for index in range(BF16_TERMS)]
                    one, two = (found[4 * (n * fragments + fragment) + 2 * half + c] for fragment, c in terms)
                    place, value = (2 * part.tile + half) * columns.own + which, one + two
                    if self._layout.fp8 is not None:
                        value = value * T.reinterpret("float32", sides[part.side + half])
                    store(sums, sums[place] + value, place)

    def total(self, value: Expr) -> Expr:
        return value


class _Staged(NamedTuple):
    """B registers, the sums of each group of them in a lane's columns , and what these count."""

    b: Buffer
    sums: Buffer
    factors: tuple[Expr, ...]


class FixedPoint:
    """Integer codes; a row is three bytes."""

    terms = fixed_point.TERMS

    def __init__(self, layout: FragmentLayout, row: Row, lane: Expr, columns: Columns) -> None:
        assert layout.integer is not None
        self._layout, self._row, self._bits, self._columns = layout, row, layout.integer.bits, columns
        self._middle = const(layout.integer.levels // 2, "int32")
        self._steps = fixed_point.group_steps(self._bits, layout.block_groups)
        t = lane % 4
        self._from = []
        for fragment in range(columns.fragments):
            token, index = columns.loaded(fragment, lane // 4)
            self._from.append(T.Bind(token * row.token_words + (index * 4 + t) * fixed_point.REGISTERS))
        self._counts: list[Expr] | None = None
        if columns.split:
            inside = t if columns.tokens == 1 else t % (columns.each // 2)
            self._counts = [T.Bind(fixed_point.weight_of_column(inside, which)) for which in range(2)]
        self._scales = [T.Bind(columns.token(t, which) * row.token_words + fixed_point.SCALE) for which in range(columns.own)]

    def activations(self, block: Expr, missing: Expr | None) -> _Staged:
        registers, fragments = fixed_point.REGISTERS, self._columns.fragments
        b = local(registers * fragments, "uint32")
        place = T.Bind(self._row.place(block))
        for fragment, start in enumerate(self._from):
            for half in range(2):
                read_words(at(b, registers * fragment + 4 * half), at(self._row.staged, place + start + 4 * half))
        if missing is not None:
            with when(missing):
                clear(b, registers * fragments)
        scales = [T.Bind(T.reinterpret("float32", self._row.staged[place + scale])) for scale in self._scales]
        sums, ones = local(4 * fragments * len(self._steps), "int32"), local(4, "uint32")
        clear(sums, 4 * fragments * len(self._steps))
        for i in range(4):
            store(ones, const(0x01010101, "uint32"), i)
        for group, steps in enumerate(self._steps):
            for n, first, second in steps:
                for fragment in range(fragments):
                    fixed_point.product(at(sums, 4 * (group * fragments + fragment)), at(ones, 0), *self._b(b, fragment, n, first, second))
        if self._counts is not None:
            scales = [T.Bind(count * scales[0]) for count in self._counts]
        return _Staged(b, sums, tuple(scales))

    @staticmethod
    def _b(b: Buffer, fragment: int, n: int, first: int, second: int) -> tuple[Expr, Expr]:
        at_first = fixed_point.REGISTERS * fragment + 2 * n
        return fixed_point.only(b[at_first], first), fixed_point.only(b[at_first + 1], second)

    def add(self, parts: Sequence[Part], activations: Mapping[int, _Staged], sums: Buffer, sides: Buffer, zeros: Buffer | None) -> None:
        own, fragments = self._columns.own, self._columns.fragments
        count = 4 * fragments * len(parts)
        found, a, scales = local(count, "int32"), local(4 * len(parts), "uint32"), local(2, "float32")
        for group, steps in enumerate(self._steps):
            clear(found, count)
            for n, first, second in steps:
                for m, part in enumerate(parts):
                    fixed_point.codes(self._bits, at(a, 4 * m), part.words, n)
                    for fragment in range(fragments):
                        b = self._b(activations[part.block].b, fragment, n, first, second)
                        fixed_point.product(at(found, 4 * (m * fragments + fragment)), at(a, 4 * m), *b)
            for m, part in enumerate(parts):
                staged = activations[part.block]
                widen(at(scales, 0), sides[part.side + group])
                for half in range(2):
                    zero = self._middle if zeros is None else T.cast(zeros[2 * (part.side + group) + half], "int32")
                    for which in range(own):
                        value = self._value(found, 4 * fragments * m, staged, 4 * fragments * group, half, which, zero)
                        place = (2 * part.tile + half) * own + which
                        store(sums, sums[place] + value * scales[half], place)

    def _value(self, found: Buffer, first: int, staged: _Staged, side: int, half: int, which: int, zero: Expr) -> Expr:
        """What a lane has of a token: the products with its terms, less those of the zero point, each as often as it counts."""
        if self._counts is not None:
            values = [T.cast(found[first + 2 * half + c] - zero * staged.sums[side + c], "float32") * staged.factors[c] for c in range(2)]
            return values[0] + values[1]
        places = [4 * fragment + c for fragment, c in (self._columns.place(which, index) for index in range(fixed_point.TERMS))]
        high, *low = (found[first + 2 * half + place] for place in places)
        sums = [staged.sums[side + place] for place in places]
        # The lower two together stay below 2^31: 128 codes of 8 bits times 2^15.
        rest = low[0] * 256 + low[1] - zero * (sums[1] * 256 + sums[2])
        return (T.cast(high - zero * sums[0], "float32") * T.float32(65536) + T.cast(rest, "float32")) * staged.factors[which]

    def total(self, value: Expr) -> Expr:
        kept = T.Bind(value)
        return T.Bind(kept + warp_down(kept, 1)) if self._columns.split else kept
