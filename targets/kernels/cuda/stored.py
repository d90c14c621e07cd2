"""The arrays of packed weights as parameters of a kernel, and how a lane reads them. Experts of several formats have arrays for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

from tvm.tirx.script import builder as T

from moec.targets.kernels.cuda.emit import Buffer, Expr, argument, at, const, local, store, when
from moec.targets.kernels.cuda.experts_layout import Stack
from moec.targets.kernels.cuda.intrinsics import term, widen
from moec.targets.kernels.cuda.layout import BLOCK, FragmentLayout
from moec.targets.kernels.cuda.loads import load_words
from moec.targets.kernels.cuda.packing import vectors


@dataclass(frozen=True)
class Place:
    """Where an expert's weights are in the arrays of its class: its index, or where it begins if experts differ in size.

    Args:
        first, side: the index; or the first block of numbers, and the first of scales.
        blocks: of a row, or so many of them as are multiplied.
        start: the first of those.
    """

    first: Expr
    side: Expr
    blocks: Expr
    start: Expr = 0


FIRST = Place(0, 0, 0)
"""The place of a matrix that is the only one of its arrays."""


class Stored:
    """The arrays of the experts of one format.

    Attributes:
        early: whether what is asked for must be on its way before the next `grid_wait`.
        mixed: whether there are experts of other formats too.
    """

    early = False
    mixed = False
    _ragged = False

    def __init__(self, stack: Stack, index: int, prefix: str) -> None:
        self.layout: FragmentLayout = stack.classes[index]
        self.mixed, self._ragged, end = stack.mixed, stack.ragged, stack.suffix(index)
        own = [f"{name}{end}" for name in self.layout.arrays()]
        self._buffers = {n.removesuffix(end): argument(f"{prefix}{n}", *spec) for n, spec in stack.arrays().items() if n in own}

    def _at(self, name: str, place: Place, tile: Expr, block: Expr, word: Expr) -> Expr:
        """The address of a word of a block of numbers."""
        index = (place.first + tile * place.blocks + block,) if self._ragged else (place.first, tile, place.start + block)
        return at(self._buffers[name], *index, word)

    def _scale_index(self, place: Place, tile: Expr, block: Expr) -> tuple[Expr, ...]:
        """The index of the scales of a block."""
        layout, span = self.layout, self.layout.scale_span
        if not self._ragged:
            return place.side, tile, (place.start + block) // span
        return (place.side + tile,) if layout.per_row else (place.side + tile * ((place.blocks + span - 1) // span) + block // span,)

    def sources(self, place: Place, tile: Expr, block: Expr, lane: Expr, unit: int | None = None) -> Iterator[tuple[int, int, Expr]]:
        """(first word, words, address) of what a lane loads of a block of 16 rows, or of one of the layout's units of it."""
        layout = self.layout
        if layout.coded is None:
            for i, v in enumerate(range(8) if unit is None else (2 * unit, 2 * unit + 1)):
                yield 4 * i, 4, self._at("values", place, tile, block, 256 * v + lane * 8)
        elif unit is not None and layout.units == 2:
            for half in range(2):
                yield 4 * half, 4, self._at("codes", place, tile, block, 128 * (2 * half + unit) + lane * 4)
        else:
            for done, count in vectors(layout.bits):
                yield done, count, self._at("codes", place, tile, block, 32 * done + lane * count)

    def fetch(self, words: Buffer, first: int, place: Place, tile: Expr, block: Expr, lane: Expr, unit: int | None = None) -> None:
        """Ask for those words, into registers from `first` on."""
        for done, count, source in self.sources(place, tile, block, lane, unit):
            load_words(at(words, first + done), source, count, self.early)

    def fetch_scales(self, sides: Buffer, first: int, place: Place, tile: Expr, block: Expr, lane: Expr) -> None:
        """Ask for the scales of a block, a pair of float16 for each group of a lane's two rows or two float32; bf16 has none."""
        layout = self.layout
        if layout.fp8 is not None:
            inner = (0,) if layout.fp8.block else (lane // 4, 0, 0)
            load_words(at(sides, first), at(self._buffers["scale"], *self._scale_index(place, tile, block), *inner), 2, self.early)
        elif layout.integer is not None:
            for group in range(0, layout.block_groups, 4):
                source = at(self._buffers["scale"], *self._scale_index(place, tile, block), lane // 4, group, 0)
                load_words(at(sides, first + group), source, min(4, layout.block_groups - group), self.early)

    def scales(self, target: Buffer, sides: Buffer, first: int, group: int) -> None:
        """The scales of a lane's two rows for a group of a block, two float32, from the words that `fetch_scales` wrote."""
        if self.layout.fp8 is not None:
            for half in range(2):
                store(target, T.reinterpret("float32", sides[first + half]), half)
        else:
            widen(at(target, 0), sides[first + group])

    def factors(self, target: Buffer, sides: Buffer, first: int, group: int, terms: int = 1) -> None:
        """The same as pairs of equal bfloat16, [terms, 2 rows]: a sum of so many."""
        values = local(2, "float32")
        self.scales(values, sides, first, group)
        for index in range(terms):
            for half in range(2):
                store(target, term(values[half], values[half], index), 2 * index + half)

    def zeros(self, place: Place, tile: Expr, block: Expr, lane: Expr, group: int) -> tuple[Expr, Expr]:
        """The zero points of a lane's two rows."""
        integer = self.layout.integer
        if integer is None or integer.symmetric:
            middle = const(integer.levels // 2 if integer else 0, "uint32")
            return middle, middle
        index = (*self._scale_index(place, tile, block), lane // 4, group)
        low, high = (T.Bind(T.cast(self._buffers["zero"][(*index, half)], "uint32")) for half in (0, 1))
        return low, high


Kind = TypeVar("Kind", bound=Stored)


class Classes(Generic[Kind]):
    """The parameters of a stack of weights."""

    def __init__(self, stack: Stack, prefix: str, kind: Callable[[Stack, int, str], Kind]) -> None:
        self.stack, self.blocks = stack, stack.classes[0].blocks
        self.kinds = [kind(stack, index, prefix) for index in range(len(stack.classes))]
        self._table = argument(f"{prefix}table", *stack.arrays()["table"]) if stack.tabled else None

    def cost(self, expert: Expr) -> Expr:
        """How much work a block of an expert's rows is: of several formats its bits, and one for what any block takes."""
        if self._table is None or not self.stack.mixed:
            return const(1, "int32")
        costs = [found.layout.block_words // 64 + 1 for found in self.kinds]
        kind, found = T.Bind(self._table[expert, 0]), const(costs[-1], "int32")
        for index, cost in enumerate(costs[:-1]):
            found = T.Select(kind == index, const(cost, "int32"), found)
        return found

    @contextmanager
    def tiles(self, expert: Expr, first: Expr) -> Iterator[Expr]:
        """The body with the number of an expert's tiles, only where that has some from `first` on."""
        if self._table is None or not self.stack.rows:
            yield self.stack.classes[0].tiles
            return
        count = T.Bind(self._table[expert, 3])
        with when(first < count):
            yield count

    def columns_of(self, expert: Expr) -> Expr:
        """Columns of an expert."""
        return self.stack.k if self._table is None or not self.stack.columns else T.Bind(self._table[expert, 3])

    def blocks_of(self, expert: Expr) -> Expr:
        """Blocks of a row of an expert."""
        return T.Bind((self.columns_of(expert) + BLOCK - 1) // BLOCK) if self.stack.columns else self.blocks

    def each(self, expert: Expr, act: Callable[[Kind, Place], None]) -> None:
        """Act with the arrays of an expert, and its place in them: a branch for each format."""
        if self._table is None:
            act(self.kinds[0], Place(expert, expert, self.blocks))
            return
        kind, first = T.Bind(self._table[expert, 0]), T.Bind(self._table[expert, 1])
        place = Place(first, T.Bind(self._table[expert, 2]) if self.stack.ragged else first, self.blocks_of(expert))
        if not self.stack.mixed:
            act(self.kinds[0], place)
            return
        with ExitStack() as stack:  # the last format is what is left
            for index, found in enumerate(self.kinds[:-1]):
                stack.enter_context(T.If(kind == index))
                with T.Then():
                    act(found, place)
                stack.enter_context(T.Else())
            act(self.kinds[-1], place)
