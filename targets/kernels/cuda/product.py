"""The product of some hundred packed rows with the activations of up to 128 tokens, on the tensor cores of compute capability 9.0.

A block of threads has two warpgroups, each with `tiles` times 64 rows. Weights go from memory into registers, become bfloat16 there and
are operand A; activations are copied into a ring of stages in shared memory and are operand B. Where `exact`, the codes are multiplied
as they are and the sums of each group get its scale in float32; otherwise weights are multiplied by their scales before, in bfloat16,
which takes half of the registers and so allows twice the tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import lcm

from tvm.tirx.script import builder as T

from moec.targets.kernels.cuda.emit import Buffer, Expr, at, const, local, store, sync, when
from moec.targets.kernels.cuda.experts_layout import Stack
from moec.targets.kernels.cuda.image import Images
from moec.targets.kernels.cuda.intrinsics import dequantize, scale
from moec.targets.kernels.cuda.layout import BLOCK
from moec.targets.kernels.cuda.matrix import (
    copy16,
    copy_commit,
    copy_wait,
    descriptor,
    pin,
    shared_address,
    wgmma,
    wgmma_commit,
    wgmma_fence,
    wgmma_wait,
)  # fmt: skip
from moec.targets.kernels.cuda.stored import Classes, Stored

THREADS = 256  # two warpgroups
STEPS = 8  # products of 16 columns in a block
PIECES = 16  # of 16 bytes in a block's row of activations


@dataclass(frozen=True)
class Shape:
    """The size of a block's product.

    Args:
        tokens: N, a multiple of 8.
        tiles: of 64 rows of a warpgroup.
        stages: of activations.
        terms: of bfloat16 that add up to an activation.
        exact: whether codes are multiplied before their scales.
        residency: blocks that are to fit on a multiprocessor, which limits their registers.
        depth: sets of registers for weights: all but one are on their way.
        batch: steps whose weights are made ready before their products start, so that few tokens wait less often.
        multiprocessors: of the GPU, for blocks of threads that stay for many tiles; 0 for one block a tile.
        cluster: blocks that share activations, 1 or 2, which are in images then; 0 for activations as they are.
    """

    tokens: int = 64
    tiles: int = 1
    stages: int = 4
    terms: int = 1
    exact: bool = True
    residency: int = 1
    depth: int = 2
    batch: int = 1
    multiprocessors: int = 132
    cluster: int = 0

    @property
    def rows(self) -> int:
        """Rows of weights of a block."""
        return 128 * self.tiles

    @property
    def stage_bytes(self) -> int:
        """Bytes of a stage."""
        return self.terms * self.tokens * BLOCK * 2

    @property
    def words(self) -> int:
        """Words of shared memory, those included that bring it to a multiple of 1024 bytes."""
        return self.stages * self.stage_bytes // 4 + 256

    @property
    def sums(self) -> int:
        """Sums of a thread for 64 rows."""
        return self.tokens // 2

    def first_tile(self, part: Expr, group: Expr, warp: Expr) -> Expr:
        """The first tile of 16 rows of a warp, in a part of `rows` rows."""
        return part * (8 * self.tiles) + group * (4 * self.tiles) + warp

    def row_tiles(self, first: Expr, last: int) -> list[Expr]:
        """All tiles of a warp; beyond the last there are none, and it takes that one again."""
        return [T.Bind(T.min(first + 4 * m, last)) for m in range(self.tiles)]


class Activations:
    """The ring of stages, and which rows of which memory go into it.

    Args:
        source: uint16 [terms, rows, k].
        k: columns that there are.
    """

    def __init__(self, shape: Shape, memory: Buffer, source: Buffer, k: int, thread: Expr) -> None:
        self.shape, self._source, self._k, self._piece = shape, source, k, T.Bind(thread % PIECES)
        base = T.Bind(shared_address(at(memory, 0)))
        self.base = T.Bind((base + const(1023, "uint32")) // 1024 * 1024)
        self._first, self._per = T.Bind(thread // PIECES), THREADS // PIECES
        self._turns = -(-shape.tokens // self._per)
        self._rows, self._valid = local(self._turns, "int32"), local(self._turns, "int32")

    def locate(self, row: Callable[[Expr], Expr], count: Expr) -> None:
        """Of a tile: the row of the source for each token, and how many there are; other tokens are zero."""
        for i in range(self._turns):
            token = T.Bind(self._first + i * self._per)
            store(self._rows, const(0, "int32"), i)
            store(self._valid, const(0, "int32"), i)
            with when(token < count):
                store(self._rows, row(token), i)
                store(self._valid, const(16, "int32"), i)

    def begin(self, blocks: int) -> None:
        """Ask for the first stages."""
        for stage in range(self.shape.stages - 2):
            if stage < blocks:
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
        ahead = self.shape.stages - 2
        copy_wait(ahead - 1)
        sync()
        with when(block + ahead < blocks):
            self.fetch(block + ahead, (block + ahead) % self.shape.stages)
        copy_commit()
        return T.Bind(block % self.shape.stages)

    def release(self, block: Expr) -> None:
        """Nothing: all threads meet at each step."""

    def finish(self, blocks: int) -> None:
        """Nothing."""

    def operand(self, stage: Expr, step: int, index: int) -> Expr:
        """The descriptor of 16 columns of a stage."""
        half = step // 4 * self.shape.tokens * 128 + step % 4 * 32
        offset = stage * self.shape.stage_bytes + index * self.shape.tokens * 256 + half
        return descriptor(self.base + T.cast(offset, "uint32"))


class Weights(Classes["_Product"]):
    """The parameters of a stack of weights, and how a block multiplies with them, a tile after the other: `begin`, then `run`."""

    def __init__(self, stack: Stack, prefix: str) -> None:
        super().__init__(stack, prefix, _Product)

    def prepare(self, shape: Shape, lane: Expr) -> None:
        """Take the registers."""
        for found in self.kinds:
            found.prepare(shape, lane)

    def begin(self, expert: Expr, tiles: list[Expr]) -> None:
        """Ask for the first weights of rows `tiles` (of 16 a warp, a tile for each 64 of a warpgroup) of an expert."""
        self.each(expert, lambda found, place: found.begin(place, tiles))

    def run(self, expert: Expr, tiles: list[Expr], activations: Activations | Images, sums: Buffer) -> None:
        """sums [tiles, tokens / 2] = W[expert, tiles] @ B, after `begin` of both."""
        self.each(expert, lambda found, place: found.run(place, tiles, activations, sums))


class _Product(Stored):
    """The arrays of the experts of one format."""

    def prepare(self, shape: Shape, lane: Expr) -> None:
        layout = self.layout
        self._shape, self._lane, self._depth = shape, lane, shape.depth
        # blocks of a turn, so that the sets of registers are used in turn
        self._turn = lcm(shape.depth, layout.units) // layout.units if layout.coded is None else shape.depth
        self._words = [local(shape.tiles * layout.unit_words, "uint32") for _ in range(self._depth)]
        self._sides = [local(shape.tiles * layout.side_words, "uint32") for _ in range(self._turn)]

    def begin(self, place: Expr, tiles: list[Expr]) -> None:
        units = self.layout.units
        for unit in range(self._depth - 1):
            if unit // units < self.layout.blocks:
                self._fetch(unit, unit // units, place, tiles, const(unit // units, "int32"), unit % units)

    def run(self, place: Expr, tiles: list[Expr], activations: Activations | Images, sums: Buffer) -> None:
        layout, shape = self.layout, self._shape
        units, blocks = layout.units, layout.blocks
        parts = local(len(tiles) * shape.sums, "float32") if self._folds else sums
        for i in range(len(tiles) * shape.sums):
            store(sums, const(0.0, "float32"), i)
        with T.serial(-(-blocks // self._turn)) as i:
            for j in range(self._turn):
                block = T.Bind(i * self._turn + j)
                with when(block < blocks):
                    stage = activations.step(block, blocks)
                    for unit in range(units):
                        now = j * units + unit

                        def ask(following: int = now + self._depth - 1, j: int = j, block: Expr = block) -> None:
                            later = following // units
                            with when(block + (later - j) < blocks):
                                self._fetch(following, later, place, tiles, block + (later - j), following % units)

                        if units == 1:
                            ask()
                        self._unit(now, j, place, tiles, block, unit, activations, stage, sums, parts, ask if units > 1 else None)
        wgmma_wait(0)
        pin(at(sums, 0), len(tiles) * shape.sums)
        activations.finish(blocks)
        if layout.coded is not None and shape.exact and not self._folds:
            self._scale(sums, len(tiles), shape.sums)

    @property
    def _folds(self) -> bool:
        """Whether sums of a group are kept apart until they are scaled. What has one scale a row is scaled at the end."""
        return self._shape.exact and self.layout.coded is not None and self.layout.groups > 1

    def _fetch(self, which: int, side: int, place: Expr, tiles: list[Expr], block: Expr, unit: int) -> None:
        """Ask for the words of a unit, and with the first of a block for its scales."""
        layout, lane = self.layout, self._lane
        for m, tile in enumerate(tiles):
            self.fetch(self._words[which % self._depth], m * layout.unit_words, place, tile, block, lane, unit)
            if unit == 0:
                self.fetch_scales(self._sides[side % self._turn], m * layout.side_words, place, tile, block, lane)

    def _unit(
        self, which: int, side: int, place: Expr, tiles: list[Expr], block: Expr, unit: int, activations: Activations | Images,
        stage: Expr, sums: Buffer, parts: Buffer, ask: Callable[[], None] | None,
    ) -> None:  # fmt: skip
        """Multiply with a unit of a block.

        Args:
            ask: for later weights, called when no product reads registers of the unit before any more: those may be operands themselves.
        """
        layout, shape, count = self.layout, self._shape, len(tiles)
        sides, groups, steps = self._sides[side], layout.block_groups, STEPS // layout.units
        exact = self._folds
        batch = min(shape.batch, steps, STEPS // groups if exact else steps)
        a = [local(4 * count * batch, "uint32") for _ in range(2)]
        for first in range(0, steps, batch):
            own, step = a[first // batch % 2], unit * steps + first
            for inner in range(batch):
                group = (step + inner) * groups // STEPS
                for m in range(count):
                    target = at(own, 4 * (inner * count + m))
                    words = at(self._words[which % self._depth], m * layout.unit_words)
                    dequantize(layout, target, words, first + inner, self.zeros(place, tiles[m], block, self._lane, group), layout.units)
                    if layout.coded is not None and not shape.exact:
                        factors = local(2, "uint32")
                        self.factors(factors, sides, m * layout.side_words, group)
                        scale(target, (factors[0], factors[1]))
            wgmma_fence()
            for inner in range(batch):
                begins = (step + inner) * groups % STEPS == 0
                for m in range(count):
                    for index in range(shape.terms):
                        add = const(int(not (exact and begins and index == 0)), "int32")
                        b = activations.operand(stage, step + inner, index)
                        wgmma(shape.tokens, at(parts, m * shape.sums), at(own, 4 * (inner * count + m)), b, add)
            wgmma_commit()
            if exact and (step + batch) * groups % STEPS == 0:
                wgmma_wait(0)
                pin(at(parts, 0), count * shape.sums)
                self._fold(sums, parts, sides, (step + batch - 1) * groups // STEPS, count, shape.sums)
            else:  # what the next batch but one overwrites is free
                wgmma_wait(1)
            if first == 0 and ask is not None:
                ask()
            if unit == 0 and first == 0:  # all products of the block before are done
                with when(block > 0):
                    activations.release(block - 1)

    def _scale(self, sums: Buffer, count: int, width: int) -> None:
        """sums *= the scales of rows."""
        scales = local(2, "float32")
        for m in range(count):
            self.scales(scales, self._sides[0], m * self.layout.side_words, 0)
            for i in range(width):
                store(sums, sums[m * width + i] * scales[i % 4 // 2], m * width + i)

    def _fold(self, sums: Buffer, parts: Buffer, sides: Buffer, group: int, count: int, width: int) -> None:
        """sums += parts * scales of the group."""
        scales = local(2, "float32")
        for m in range(count):
            self.scales(scales, sides, m * self.layout.side_words, group)
            for i in range(width):
                index = m * width + i
                store(sums, sums[index] + parts[index] * scales[i % 4 // 2], index)
