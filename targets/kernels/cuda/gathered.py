"""The activations that a block's product multiplies with, copied from where they are into shared memory."""

from __future__ import annotations

from collections.abc import Callable

from tvm.tirx.script import builder as T

from moec.targets.kernels.cuda.copies import copy16, copy_commit, copy_wait, shared_address
from moec.targets.kernels.cuda.emit import Buffer, Expr, at, const, local, store, sync, when
from moec.targets.kernels.cuda.layout import BLOCK, ceil_div
from moec.targets.kernels.cuda.matrix import descriptor, proxy_fence
from moec.targets.kernels.cuda.shape import Shape
from moec.targets.kernels.cuda.staged import Staged

PIECES = 16  # of 16 bytes in a block's row of activations


def first_tile(shape: Shape, part: Expr, group: Expr, warp: Expr) -> Expr:
    """The first tile of 16 rows of a warp, in a part of `shape.rows` rows."""
    return part * shape.block_tiles + group * (4 * shape.tiles) + warp


def row_tiles(shape: Shape, first: Expr, last: int) -> list[Expr]:
    """All tiles of a warp; beyond the last there are none, and it takes that one again."""
    return [T.Bind(T.min(first + 4 * m, last)) for m in range(shape.tiles)]


class Activations(Staged):
    """The ring of stages, and which rows of which memory go into it.

    Args:
        source: uint16 [terms, rows, k].
        k: columns that there are, at most.
    """

    def __init__(self, shape: Shape, memory: Buffer, source: Buffer, k: int, thread: Expr) -> None:
        self.shape, self._source, self._piece = shape, source, T.Bind(thread % PIECES)
        self._whole = ceil_div(k, BLOCK) <= shape.stages
        self._columns: Expr = k
        self._own: Buffer | None = None
        base = T.Bind(shared_address(at(memory, 0)))
        self.base = T.Bind((base + const(1023, "uint32")) // 1024 * 1024)
        self._first, self._per = T.Bind(thread // PIECES), shape.threads // PIECES
        self._turns = ceil_div(shape.tokens, self._per)
        self._rows, self._valid = local(self._turns, "int32"), local(self._turns, "int32")

    def vary(self) -> None:
        """Tiles differ in their columns, which `locate` is given."""
        self._own = local(1, "int32")

    @property
    def _k(self) -> Expr:
        return self._columns if self._own is None else self._own[0]

    def locate(self, row: Callable[[Expr], Expr], count: Expr, columns: Expr | None = None) -> None:
        """Of a tile: the row of the source for each token, and how many there are; other tokens are zero, and so are other columns."""
        if self._own is not None:
            store(self._own, columns, 0)
        for i in range(self._turns):
            token = T.Bind(self._first + i * self._per)
            store(self._rows, const(0, "int32"), i)
            store(self._valid, const(0, "int32"), i)
            with when(token < count):
                store(self._rows, row(token), i)
                store(self._valid, const(16, "int32"), i)

    def begin(self, blocks: Expr) -> None:
        """Ask for the first stages."""
        if self._whole:
            with T.serial(blocks) as block:
                self.fetch(block, block)
            copy_commit()
            return
        for stage in range(self.shape.stages - 2):
            with when(const(stage, "int32") < blocks):
                self.fetch(const(stage, "int32"), stage)
            copy_commit()

    def fetch(self, block: Expr, stage: Expr) -> None:
        """Copy a block of columns into a stage."""
        shape, column = self.shape, T.Bind(block * BLOCK + self._piece * 8)
        half = self._piece // 8 * (shape.tokens * 128)
        for i in range(self._turns):
            token = self._first + i * self._per
            with when(token < shape.tokens):
                swizzled = (self._piece % 8 ^ token % 8) * 16
                bytes_here = T.Select(column < self._k, self._valid[i], const(0, "int32"))
                for index in range(shape.terms):
                    offset = stage * shape.stage_bytes + index * shape.tokens * 256 + half + token * 128 + swizzled
                    source = at(self._source, index, self._rows[i], T.Select(column < self._k, column, 0))
                    copy16(self.base + T.cast(offset, "uint32"), source, bytes_here)

    def step(self, block: Expr, blocks: int) -> Expr:
        """Wait for a block's stage, and ask for a later one's: the stage."""
        if self._whole:
            with when(block == 0):
                copy_wait(0)
                proxy_fence()
                sync()
            return block
        ahead = self.shape.stages - 2
        copy_wait(ahead - 1)
        proxy_fence()
        sync()
        with when(block + ahead < blocks):
            self.fetch(block + ahead, (block + ahead) % self.shape.stages)
        copy_commit()
        return T.Bind(block % self.shape.stages)

    def operand(self, stage: Expr, step: int, index: int) -> Expr:
        """The descriptor of 16 columns of a stage."""
        half = step // 4 * self.shape.tokens * 128 + step % 4 * 32
        offset = stage * self.shape.stage_bytes + index * self.shape.tokens * 256 + half
        return descriptor(self.base + T.cast(offset, "uint32"))
