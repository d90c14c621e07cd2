"""The product of a tile of 16 packed rows with the columns of a block's activations, read as one stream from memory into registers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm.tirx.script import builder as T

from moec.targets.kernels.cuda.emit import Buffer, Expr, argument, at, const, local, store, when
from moec.targets.kernels.cuda.experts_layout import Stack
from moec.targets.kernels.cuda.intrinsics import dequantize, load_words, mma, widen
from moec.targets.kernels.cuda.layout import FragmentLayout, planes

STEPS = 8  # products of 16 columns in a block

LoadB = Callable[[Buffer, Expr, int], None]
"""Reads the B fragments of columns 32 j to 32 j + 31 of a block: (registers uint32 [columns / 8 * 4], block, j)."""


@dataclass
class Columns:
    """The sums of a warp: float32 [columns / 8, 4], a fragment of 16 rows by 8 columns each.

    Args:
        count: fragments.
        factors: float32 [count, 2], by which what is added to each of a lane's two columns is multiplied; None for 1.
    """

    count: int
    factors: Buffer | None = None

    def __post_init__(self) -> None:
        self.sums = local(4 * self.count, "float32")
        for i in range(4 * self.count):
            store(self.sums, const(0.0, "float32"), i)

    def add(self, parts: Buffer, scales: Buffer | None) -> None:
        """sums += parts * scales[row] * factors[column]."""
        for n in range(self.count):
            for c in range(4):
                value = parts[4 * n + c]
                if scales is not None:
                    value = value * scales[c // 2]
                if self.factors is not None:
                    value = value * self.factors[2 * n + c % 2]
                store(self.sums, self.sums[4 * n + c] + value, 4 * n + c)


class Weights:
    """The parameters of a stack of weights, and how a warp multiplies with them.

    Args:
        unroll: blocks that are under way at a time, so many for each format: `unroll` bytes of a lane.
    """

    def __init__(self, stack: Stack, prefix: str, unroll: int) -> None:
        self.stack, self._bytes = stack, unroll
        self._classes = [_Class(stack, index, prefix) for index in range(len(stack.classes))]
        self._table = argument(f"{prefix}table", (stack.experts, 2), "int32") if stack.mixed else None

    def stream(
        self, expert: Expr, tile: Expr, start: Expr, stop: Expr, lane: Expr, load: LoadB, columns: Columns,
        loaded: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        """columns += W[expert, tile, start:stop blocks] @ B.

        Args:
            loaded: called once the first loads of weights are under way, before B is read.
        """
        if self._table is None:
            self._classes[0].stream(expert, tile, start, stop, lane, load, columns, loaded, self._bytes)
            return
        kind, place = T.Bind(self._table[expert, 0]), T.Bind(self._table[expert, 1])
        for index, found in enumerate(self._classes):
            with when(kind == index):
                found.stream(place, tile, start, stop, lane, load, columns, loaded, self._bytes)


class _Class:
    """The arrays of the experts of one format."""

    def __init__(self, stack: Stack, index: int, prefix: str) -> None:
        self.layout: FragmentLayout = stack.classes[index]
        lead, end = len(stack.members(index)), stack.suffix(index)
        self.buffers = {n: argument(f"{prefix}{n}{end}", s, d) for n, (s, d) in self.layout.arrays(lead).items()}

    @property
    def lane_words(self) -> int:
        """Words that a lane holds of a block."""
        return self.layout.block_words // 32

    def stream(
        self, place: Expr, tile: Expr, start: Expr, stop: Expr, lane: Expr, load: LoadB, columns: Columns,
        loaded: Callable[[], None] | None, size: int,
    ) -> None:  # fmt: skip
        depth = max(1, min(size // (4 * self.lane_words), self.layout.blocks))
        words = local(depth * self.lane_words, "uint32")
        sides = local(depth * self.layout.block_groups, "uint32")
        for u in range(depth):
            with when(start + u < stop):
                self._fetch(words, sides, u, place, tile, start + u, lane)
        if loaded is not None:
            loaded()
        with T.serial((stop - start + depth - 1) // depth) as turn:
            for u in range(depth):
                block = T.Bind(start + turn * depth + u)
                with when(block < stop):
                    self._multiply(words, sides, u, place, tile, block, lane, load, columns)
                    with when(block + depth < stop):
                        self._fetch(words, sides, u, place, tile, block + depth, lane)

    def _fetch(self, words: Buffer, sides: Buffer, u: int, place: Expr, tile: Expr, block: Expr, lane: Expr) -> None:
        """Ask for the words and scales of a block."""
        layout, first = self.layout, u * self.lane_words
        if layout.integer is None:
            for v in range(8):
                load_words(at(words, first + 4 * v), at(self.buffers["values"], place, tile, block, 256 * v + lane * 8), 4)
            return
        begin, done = 0, 0
        for width, _ in planes(layout.integer.bits):
            count = min(4, 2 * width)
            for v in range(2 * width // count):
                source = at(self.buffers["codes"], place, tile, block, begin + v * 32 * count + lane * count)
                load_words(at(words, first + done + v * count), source, count)
            begin, done = begin + 64 * width, done + 2 * width
        groups = layout.block_groups
        source = at(self.buffers["scale"], place, tile, block // layout.scale_span, lane // 4, 0, 0)
        load_words(at(sides, u * groups), source, groups)

    def _multiply(
        self, words: Buffer, sides: Buffer, u: int, place: Expr, tile: Expr, block: Expr, lane: Expr, load: LoadB, columns: Columns
    ) -> None:
        """Add the product with one block."""
        layout, groups = self.layout, self.layout.block_groups
        parts, a, scales = local(4 * columns.count, "float32"), local(4, "uint32"), local(2, "float32")
        b = [local(4 * columns.count, "uint32") for _ in range(4)]
        for j in range(4):  # all before the first product, which waits for one of them only
            load(b[j], block, j)
        for group in range(groups):
            for i in range(4 * columns.count):
                store(parts, const(0.0, "float32"), i)
            zeros = self._zeros(place, tile, block, lane, group)
            for step in range(group * STEPS // groups, (group + 1) * STEPS // groups):
                dequantize(layout, at(a, 0), at(words, u * self.lane_words), step, zeros)
                for n in range(columns.count):
                    first = 4 * n + 2 * (step % 2)
                    mma(at(parts, 4 * n), at(a, 0), b[step // 2][first], b[step // 2][first + 1])
            if layout.integer is not None:
                widen(at(scales, 0), sides[u * groups + group])
            columns.add(parts, scales if layout.integer is not None else None)

    def _zeros(self, place: Expr, tile: Expr, block: Expr, lane: Expr, group: int) -> tuple[Expr, Expr]:
        """The zero points of a lane's two rows."""
        integer = self.layout.integer
        if integer is None or integer.symmetric:
            middle = const(integer.levels // 2 if integer else 0, "uint32")
            return middle, middle
        index = (place, tile, block // self.layout.scale_span, lane // 4, group)
        low, high = (T.Bind(T.cast(self.buffers["zero"][(*index, half)], "uint32")) for half in (0, 1))
        return low, high
