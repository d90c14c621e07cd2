"""Activations of a warp on their way into shared memory, some blocks of columns ahead of the products that read them."""

from __future__ import annotations

from collections.abc import Callable

from tvm.tirx.script import builder as T

from moec.targets.kernels.cuda.copies import copy16, copy_commit, copy_wait, shared_address
from moec.targets.kernels.cuda.emit import Buffer, Expr, Shared, at, const, local, store, when
from moec.targets.kernels.cuda.layout import BLOCK, COLUMN_WORDS, blocks_ahead, ceil_div
from moec.targets.kernels.cuda.loads import read_words
from moec.targets.kernels.cuda.warp import sync_warp

PIECES = 16  # of 16 bytes of a column's block


class Ring:
    """What a warp has under way of some columns of activations.

    Args:
        source: the address of a word, a pair of bfloat16, of a row.
        columns: how many there are.
        memory: has `words` left.
    """

    def __init__(self, source: Callable[[Expr, Expr], Expr], columns: int, memory: Shared, warp: Expr, warps: int, lane: Expr) -> None:
        self._source, self._columns, self._lane = source, columns, lane
        self._memory = memory.take((self.words(columns, warps),), "uint32")
        self._first = T.Bind(warp * (blocks_ahead(columns) * columns * COLUMN_WORDS))
        self._turns = ceil_div(columns * PIECES, 32)
        self._rows = local(self._turns, "int32")

    @staticmethod
    def words(columns: int, warps: int) -> int:
        """Words of a block's memory."""
        return warps * blocks_ahead(columns) * columns * COLUMN_WORDS

    def depth(self, most: int) -> int:
        """Blocks that are on their way where at most so many are of weights: a power of two."""
        return min(blocks_ahead(self._columns), 1 << (most.bit_length() - 1))

    def locate(self, row: Callable[[Expr], Expr]) -> None:
        """Where the columns are from now on: the row of each column, -1 for zeros."""
        for i in range(self._turns):
            column = T.Bind((self._lane + 32 * i) // PIECES)
            store(self._rows, const(-1, "int32"), i)
            with when(column < self._columns):
                store(self._rows, row(column), i)

    def ask(self, block: Expr, stop: Expr, slot: int) -> None:
        """Copy a block of the columns into a slot, if it is before `stop`."""
        with when(block < stop):
            for i in range(self._turns):
                index = self._lane + 32 * i
                with when(index < self._columns * PIECES):
                    target = self._place(slot, index // PIECES) + index % PIECES * 4
                    source = self._source(T.max(self._rows[i], 0), block * (BLOCK // 2) + index % PIECES * 4)
                    count = T.Select(self._rows[i] >= 0, const(16, "int32"), const(0, "int32"))
                    copy16(shared_address(at(self._memory, target)), source, count)
        copy_commit()

    def arrive(self, depth: int) -> None:
        """Wait for the oldest of `depth` blocks."""
        copy_wait(depth - 1)
        sync_warp()

    def leave(self) -> None:
        """All lanes have read what the next `ask` overwrites."""
        sync_warp()

    def read(self, b: Buffer, fragments: int, slot: int, j: int) -> None:
        """The B fragments of columns 32 j to 32 j + 31 of a slot's block."""
        for n in range(fragments):
            column = T.min(n * 8 + self._lane // 4, self._columns - 1)  # what the others compute is not used
            read_words(at(b, 4 * n), at(self._memory, self._place(slot, column) + j * 16 + self._lane % 4 * 4))

    def _place(self, slot: int, column: Expr) -> Expr:
        return self._first + (slot * self._columns + column) * COLUMN_WORDS
