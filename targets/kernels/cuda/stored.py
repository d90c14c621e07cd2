"""The arrays of packed weights as parameters of a kernel, and how a lane reads them. Experts of several formats have arrays for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from tvm.tirx.script import builder as T

from moec.targets.kernels.cuda.emit import Buffer, Expr, argument, at, const, store, when
from moec.targets.kernels.cuda.experts_layout import Stack
from moec.targets.kernels.cuda.intrinsics import bf16_factors, load_words, term, widen
from moec.targets.kernels.cuda.layout import FragmentLayout
from moec.targets.kernels.cuda.packing import vectors


class Stored:
    """The arrays of the experts of one format.

    Attributes:
        early: whether what is asked for must be on its way before the next `grid_wait`.
    """

    early = False

    def __init__(self, stack: Stack, index: int, prefix: str) -> None:
        self.layout: FragmentLayout = stack.classes[index]
        lead, end = len(stack.members(index)), stack.suffix(index)
        self._buffers = {n: argument(f"{prefix}{n}{end}", s, d) for n, (s, d) in self.layout.arrays(lead).items()}

    def fetch(self, words: Buffer, first: int, place: Expr, tile: Expr, block: Expr, lane: Expr, unit: int | None = None) -> None:
        """Ask for the words of a block of 16 rows, or of one of the layout's units of it, into registers from `first` on."""
        layout = self.layout
        if layout.coded is None:
            for i, v in enumerate(range(8) if unit is None else (2 * unit, 2 * unit + 1)):
                load_words(at(words, first + 4 * i), at(self._buffers["values"], place, tile, block, 256 * v + lane * 8), 4, self.early)
        elif unit is not None and layout.units == 2:
            for half in range(2):
                source = at(self._buffers["codes"], place, tile, block, 128 * (2 * half + unit) + lane * 4)
                load_words(at(words, first + 4 * half), source, 4, self.early)
        else:
            for done, count in vectors(layout.bits):
                source = at(self._buffers["codes"], place, tile, block, 32 * done + lane * count)
                load_words(at(words, first + done), source, count, self.early)

    def fetch_scales(self, sides: Buffer, first: int, place: Expr, tile: Expr, block: Expr, lane: Expr) -> None:
        """Ask for the scales of a block, a pair of float16 for each group of a lane's two rows or two float32; bf16 has none."""
        layout = self.layout
        if layout.fp8 is not None:
            index = (tile, block, 0) if layout.fp8.block else (tile, 0, lane // 4, 0, 0)
            load_words(at(sides, first), at(self._buffers["scale"], place, *index), 2)
        elif layout.integer is not None:
            source = at(self._buffers["scale"], place, tile, block // layout.scale_span, lane // 4, 0, 0)
            load_words(at(sides, first), source, layout.block_groups, self.early)

    def scales(self, target: Buffer, sides: Buffer, first: int, group: int) -> None:
        """The scales of a lane's two rows for a group of a block, two float32, from the words that `fetch_scales` wrote."""
        if self.layout.fp8 is not None:
            for half in range(2):
                store(target, T.reinterpret("float32", sides[first + half]), half)
        else:
            widen(at(target, 0), sides[first + group])

    def factors(self, target: Buffer, sides: Buffer, first: int, group: int) -> None:
        """The same as pairs of equal bfloat16."""
        if self.layout.fp8 is not None:
            for half in range(2):
                value = T.Bind(T.reinterpret("float32", sides[first + half]))
                store(target, term(value, value, 0), half)
        else:
            bf16_factors(at(target, 0), sides[first + group])

    def zeros(self, place: Expr, tile: Expr, block: Expr, lane: Expr, group: int) -> tuple[Expr, Expr]:
        """The zero points of a lane's two rows."""
        integer = self.layout.integer
        if integer is None or integer.symmetric:
            middle = const(integer.levels // 2 if integer else 0, "uint32")
            return middle, middle
        index = (place, tile, block // self.layout.scale_span, lane // 4, group)
        low, high = (T.Bind(T.cast(self._buffers["zero"][(*index, half)], "uint32")) for half in (0, 1))
        return low, high


Kind = TypeVar("Kind", bound=Stored)


class Classes(Generic[Kind]):
    """The parameters of a stack of weights."""

    def __init__(self, stack: Stack, prefix: str, kind: Callable[[Stack, int, str], Kind]) -> None:
        self.stack, self.blocks = stack, stack.classes[0].blocks
        self.kinds = [kind(stack, index, prefix) for index in range(len(stack.classes))]
        self._table = argument(f"{prefix}table", (stack.experts, 2), "int32") if stack.mixed else None

    def cost(self, expert: Expr) -> Expr:
        """How much work a block of an expert's rows is: its bits, and one for what any block takes."""
        costs = [found.layout.block_words // 64 + 1 for found in self.kinds]
        if self._table is None:
            return const(costs[0], "int32")
        kind, found = T.Bind(self._table[expert, 0]), const(costs[-1], "int32")
        for index, cost in enumerate(costs[:-1]):
            found = T.Select(kind == index, const(cost, "int32"), found)
        return found

    def each(self, expert: Expr, act: Callable[[Kind, Expr], None]) -> None:
        """Act with the arrays of an expert, and its place in them: a branch for each format."""
        if self._table is None:
            act(self.kinds[0], expert)
            return
        kind, place = T.Bind(self._table[expert, 0]), T.Bind(self._table[expert, 1])
        for index, found in enumerate(self.kinds):
            with when(kind == index):
                act(found, place)
