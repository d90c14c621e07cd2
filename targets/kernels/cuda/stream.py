"""The product of a tile of 16 packed rows with the columns of a block's activations, read as one stream from memory into registers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm.tirx.script import builder as T

from moec.targets.kernels.cuda.dequantize import dequantize
from moec.targets.kernels.cuda.emit import Buffer, Expr, at, const, local, store, strided, when
from moec.targets.kernels.cuda.experts_layout import Stack
from moec.targets.kernels.cuda.intrinsics import mma, term
from moec.targets.kernels.cuda.layout import BLOCK, PADDING
from moec.targets.kernels.cuda.loads import load_pair, read_words
from moec.targets.kernels.cuda.ring import Ring
from moec.targets.kernels.cuda.stored import Classes, Place, Stored

STEPS = 8  # products of 16 columns in a block

LoadB = Callable[[Buffer, Expr, int], None]
"""Reads the B fragments of columns 32 j to 32 j + 31 of a block: (registers uint32 [columns / 8 * 4], block, j)."""


def in_order(pair: Expr, inner: Expr) -> Expr:
    """Where a lane reads a pair of columns, `inner` of 32: pair 8 s + 4 h + t is at 4 t + 2 s + h."""
    return pair - inner + inner % 4 * 4 + inner // 8 * 2 + inner // 4 % 2


def stage(staged: Buffer, stride: int, row: int, terms: int, x: Buffer, token: int, thread: Expr, threads: int) -> None:
    """A token of x [T, k] as `terms` rows of bfloat16 pairs in shared memory, `row` the first, in the order in which lanes read them.

    Args:
        stride: words of a row, `PADDING` included.
    """
    k = int(x.shape[1])
    with strided(thread, stride - PADDING, threads) as pair:
        inner = T.Bind(pair % 16)
        place = T.Bind(in_order(pair, inner))
        values = local(2, "float32")
        for i in range(2):
            store(values, const(0.0, "float32"), i)
        with when(pair * 2 < k):
            load_pair(at(values, 0), at(x, token, pair * 2), str(x.dtype))
        for index in range(terms):
            store(staged, term(values[0], values[1], index), (row + index) * stride + place)


def staged_columns(staged: Buffer, stride: int, columns: int, fragments: int, lane: Expr) -> LoadB:
    """How B is read from so many staged rows, which are its columns."""

    def load(b: Buffer, block: Expr, j: int) -> None:
        for n in range(fragments):
            column = T.min(n * 8 + lane // 4, columns - 1)  # what the others compute is not used
            read_words(at(b, 4 * n), at(staged, column * stride + block * (BLOCK // 2) + j * 16 + lane % 4 * 4))

    return load


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


class Weights(Classes["_Stream"]):
    """The parameters of a stack of weights, and how a warp multiplies with them.

    Args:
        unroll: blocks that are under way at a time, so many for each format: `unroll` bytes of a lane.
    """

    def __init__(self, stack: Stack, prefix: str, unroll: int) -> None:
        super().__init__(stack, prefix, _Stream)
        self._bytes = unroll

    def stream(
        self, expert: Expr, tile: Expr, start: Expr, stop: Expr, lane: Expr, load: LoadB | Ring, columns: Columns,
        loaded: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        """columns += W[expert, tile, start:stop blocks] @ B.

        Args:
            load: how B is read, or the ring that it comes by.
            loaded: called once the first loads of weights are under way, before B is read.
        """
        self.each(expert, lambda found, place: found.stream(place, tile, start, stop, lane, load, columns, loaded, self._bytes))


class _Stream(Stored):
    """The arrays of the experts of one format."""

    early = True  # otherwise the compiler asks for some of them after the barriers

    @property
    def lane_words(self) -> int:
        """Words that a lane holds of a block."""
        return self.layout.block_words // 32

    def stream(
        self, place: Place, tile: Expr, start: Expr, stop: Expr, lane: Expr, load: LoadB | Ring, columns: Columns,
        loaded: Callable[[], None] | None, size: int,
    ) -> None:  # fmt: skip
        depth = max(1, min(size // (4 * self.lane_words), self.layout.blocks))
        ahead = 0
        if isinstance(load, Ring):
            ahead = load.depth(depth)
            depth -= depth % ahead
        words = local(depth * self.lane_words, "uint32")
        sides = local(depth * self.layout.side_words, "uint32")
        if self.mixed:  # what is written on a condition only would live through the loop around this, that of each format
            for registers in (words, sides):
                for i in range(int(registers.shape[0])):
                    store(registers, const(0, "uint32"), i)
        for u in range(depth):
            with when(start + u < stop):
                self._fetch(words, sides, u, place, tile, start + u, lane)
        if loaded is not None:
            loaded()
        if isinstance(load, Ring):
            for u in range(ahead):
                load.ask(start + u, stop, u)
        with T.serial((stop - start + depth - 1) // depth) as turn:
            for u in range(depth):
                block = T.Bind(start + turn * depth + u)
                with when(block < stop):
                    b = self._b(load, block, u % max(ahead, 1), ahead, columns.count)
                    self._multiply(words, sides, u, place, tile, block, lane, b, columns)
                    if isinstance(load, Ring):  # not before: the compiler reads B late, so that it takes few registers
                        load.leave()
                        load.ask(block + ahead, stop, u % ahead)
                    with when(block + depth < stop):
                        self._fetch(words, sides, u, place, tile, block + depth, lane)

    def _fetch(self, words: Buffer, sides: Buffer, u: int, place: Place, tile: Expr, block: Expr, lane: Expr) -> None:
        """Ask for the words and scales of a block."""
        self.fetch(words, u * self.lane_words, place, tile, block, lane)
        self.fetch_scales(sides, u * self.layout.side_words, place, tile, block, lane)

    @staticmethod
    def _b(load: LoadB | Ring, block: Expr, slot: int, ahead: int, fragments: int) -> list[Buffer]:
        """The B fragments of a block, all asked for before the first product, which waits for one of them only."""
        b = [local(4 * fragments, "uint32") for _ in range(4)]
        if isinstance(load, Ring):
            load.arrive(ahead)
        for j in range(4):
            if isinstance(load, Ring):
                load.read(b[j], fragments, slot, j)
            else:
                load(b[j], block, j)
        return b

    def _multiply(
        self, words: Buffer, sides: Buffer, u: int, place: Place, tile: Expr, block: Expr, lane: Expr, b: list[Buffer], columns: Columns
    ) -> None:
        """Add the product with one block."""
        layout, groups = self.layout, self.layout.block_groups
        parts, a, scales = local(4 * columns.count, "float32"), local(4, "uint32"), local(2, "float32")
        for group in range(groups):
            zeros = self.zeros(place, tile, block, lane, group)
            begin = group * STEPS // groups
            for step in range(begin, (group + 1) * STEPS // groups):
                dequantize(layout, at(a, 0), at(words, u * self.lane_words), step, zeros)
                for n in range(columns.count):
                    first = 4 * n + 2 * (step % 2)
                    mma(at(parts, 4 * n), at(a, 0), b[step // 2][first], b[step // 2][first + 1], step == begin)
            if layout.coded is not None:
                self.scales(scales, sides, u * layout.side_words, group)
            columns.add(parts, scales if layout.coded is not None else None)
