"""The product of some hundred packed rows with the activations of up to 128 tokens, on the tensor cores of compute capability 9.0.

A block of threads has two warpgroups, each with `tiles` times 64 rows. Weights go from memory into registers, become bfloat16 there and
are operand A; activations are copied into a ring of stages in shared memory and are operand B. Where `exact`, the codes are multiplied
as they are and the sums of each group get its scale in float32; otherwise weights are multiplied by their scales before, in bfloat16,
which takes half of the registers and so allows twice the tokens. What has one scale a row is scaled at the end either way.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from math import lcm
from typing import Any

from tvm.tirx.script import builder as T

from moec.targets.kernels.cuda.copies import copy_commit, copy_wait, copy_words, shared_address
from moec.targets.kernels.cuda.dequantize import dequantize
from moec.targets.kernels.cuda.emit import Buffer, Expr, Shared, at, const, local, store, when
from moec.targets.kernels.cuda.experts_layout import Stack
from moec.targets.kernels.cuda.intrinsics import scale
from moec.targets.kernels.cuda.loads import read_words
from moec.targets.kernels.cuda.matrix import multiply, pin, wgmma_commit, wgmma_fence, wgmma_wait
from moec.targets.kernels.cuda.product_narrow import NarrowProduct
from moec.targets.kernels.cuda.registers import Registers
from moec.targets.kernels.cuda.shape import Shape
from moec.targets.kernels.cuda.staged import Staged
from moec.targets.kernels.cuda.stored import Classes, Place, Stored

STEPS = 8  # products of 16 columns in a block
PRECISE_BITS = 8  # of weights from which on rounding their scales would be much of the error


class Weights(Classes[Any]):
    """The parameters of a stack of weights, and how a block multiplies with them, a tile after the other: `begin`, then `run`.

    Args:
        narrow: whether activations are E4M3 too.
    """

    def __init__(self, stack: Stack, prefix: str, *, narrow: bool = False) -> None:
        super().__init__(stack, prefix, NarrowProduct if narrow else Product)

    def prepare(self, shape: Shape, thread: Expr, memory: Shared | None = None) -> None:
        """Take the registers, and the memory of a ring, of `shape.ring_words`."""
        ring = memory.take((shape.ring_words(self.stack),), "uint32") if memory is not None and shape.ring else None
        registers = Registers(*(max(sizes) for sizes in zip(*(found.sizes(shape) for found in self.kinds), strict=True)))
        for found in self.kinds:
            found.prepare(shape, thread, ring, registers)

    def begin(self, expert: Expr, tiles: list[Expr]) -> None:
        """Ask for the first weights of rows `tiles` (of 16 a warp, a tile for each 64 of a warpgroup) of an expert."""
        self.each(expert, lambda found, place: found.begin(place, tiles))

    def run(self, expert: Expr, tiles: list[Expr], activations: Staged, sums: Buffer, count: Expr) -> None:
        """sums [tiles, tokens / 2] = W[expert, tiles] @ B, after `begin` of both: of `count` tokens, what others have is not used."""
        few, *more = activations.shape.columns
        with ExitStack() as stack:
            if more:
                stack.enter_context(T.If(count <= few))
                with T.Then():
                    self.each(expert, lambda found, place: found.run(place, tiles, activations, sums, few))
                stack.enter_context(T.Else())
            self.each(expert, lambda found, place: found.run(place, tiles, activations, sums, activations.shape.tokens))


class Product(Stored):
    """The arrays of the experts of one format."""

    def sizes(self, shape: Shape) -> tuple[int, int]:
        """Of the sets of `Registers`."""
        return shape.tiles * self.layout.unit_words, shape.tiles * self.layout.side_words

    def prepare(self, shape: Shape, thread: Expr, ring: Buffer | None, registers: Registers) -> None:
        layout = self.layout
        self._shape, self._thread, self._lane, self._depth, self._ring = shape, thread, T.Bind(thread % 32), shape.depth, ring
        # blocks of a turn, so that the sets of registers are used in turn
        sets = lcm(shape.depth, shape.ring or 1)
        self._turn = lcm(sets, layout.units) // layout.units if layout.coded is None or ring is not None else shape.depth
        self._words, self._sides = registers.words(self._depth), registers.sides(self._turn)

    def begin(self, place: Place, tiles: list[Expr]) -> None:
        units = self.layout.units
        for unit in range((self._shape.ring if self._ring is not None else self._depth) - 1):
            block = const(unit // units, "int32")
            with when(block < place.blocks):
                if self._ring is not None:
                    self._copy(unit, place, tiles, block, unit % units)
                else:
                    self._fetch(unit, unit // units, place, tiles, block, unit % units)
            if self._ring is not None:
                copy_commit()

    def run(self, place: Place, tiles: list[Expr], activations: Staged, sums: Buffer, columns: int) -> None:
        layout, shape = self.layout, self._shape
        self._columns = columns
        units, blocks = layout.units, place.blocks
        parts = local(len(tiles) * shape.sums, "float32") if self._folds else sums
        for i in range(len(tiles) * shape.sums):
            store(sums, const(0.0, "float32"), i)
        if self._ring is not None:
            for unit in range(self._depth - 1):
                with when(unit // units < blocks):
                    copy_wait(shape.ring - 2 - unit)
                    self._fetch(unit, unit // units, place, tiles, const(unit // units, "int32"), unit % units)
        with T.serial((blocks + self._turn - 1) // self._turn) as i:
            for j in range(self._turn):
                block = T.Bind(i * self._turn + j)
                with when(block < blocks):
                    stage = activations.step(block, blocks)
                    for unit in range(units):
                        now = j * units + unit

                        def ask(following: int = now + self._depth - 1, j: int = j, block: Expr = block) -> None:
                            later = following // units
                            if self._ring is not None:
                                self._ahead(following - self._depth + 1, j, place, tiles, block, blocks)
                            with when(block + (later - j) < blocks):
                                self._fetch(following, later, place, tiles, block + (later - j), following % units)

                        if units == 1:
                            ask()
                        stage = self._unit(now, j, place, tiles, block, unit, activations, stage, sums, parts, ask if units > 1 else None)
        wgmma_wait(0)
        pin(at(sums, 0), len(tiles) * shape.sums)
        activations.finish(blocks)
        if self._late:
            self._scale(sums, len(tiles), shape.sums)

    @property
    def _late(self) -> bool:
        """Whether there is one scale a row, which sums are multiplied with at the end."""
        return self.layout.coded is not None and self.layout.groups == 1

    @property
    def _folds(self) -> bool:
        """Whether sums of a group are kept apart until they are scaled."""
        return self._shape.exact and self.layout.coded is not None and not self._late

    def _fetch(self, which: int, side: int, place: Place, tiles: list[Expr], block: Expr, unit: int) -> None:
        """Ask for the words of a unit, which a ring has already, and with the first of a block for its scales."""
        layout, lane, words = self.layout, self._lane, self._words[which % self._depth]
        for m, tile in enumerate(tiles):
            if self._ring is None:
                self.fetch(words, m * layout.unit_words, place, tile, block, lane, unit)
            for first in range(0, layout.unit_words if self._ring is not None else 0, 4):
                count = min(4, layout.unit_words - first)
                read_words(at(words, m * layout.unit_words + first), at(self._ring, self._slot(which, m, first, count)), count)
            if unit == 0:
                self.fetch_scales(self._sides[side % self._turn], m * layout.side_words, place, tile, block, lane)

    def _slot(self, which: int, m: int, first: int, count: int) -> Expr:
        """Where in the ring a thread has words of a unit: those of all threads that are loaded at once follow each other."""
        return (
            (which % self._shape.ring * self._shape.tiles + m) * self.layout.unit_words + first
        ) * self._shape.threads + self._thread * count

    def _copy(self, which: int, place: Place, tiles: list[Expr], block: Expr, unit: int) -> None:
        """Ask for the words of a unit as a slot of the ring, which this thread alone writes and reads."""
        for m, tile in enumerate(tiles):
            for first, count, source in self.sources(place, tile, block, self._lane, unit):
                copy_words(shared_address(at(self._ring, self._slot(which, m, first, count))), source, count)

    def _ahead(self, now: int, j: int, place: Place, tiles: list[Expr], block: Expr, blocks: Expr) -> None:
        """While unit `now` of a turn is multiplied: ask for one that takes the slot of the unit before, and wait for the next ones."""
        units, ring = self.layout.units, self._shape.ring
        coming = now + ring - 1
        with when(block + (coming // units - j) < blocks):
            self._copy(coming, place, tiles, block + (coming // units - j), coming % units)
        copy_commit()
        copy_wait(ring - self._depth)

    def _unit(
        self, which: int, side: int, place: Place, tiles: list[Expr], block: Expr, unit: int, activations: Staged,
        stage: Expr, sums: Buffer, parts: Buffer, ask: Callable[[], None] | None,
    ) -> Expr:  # fmt: skip
        """Multiply with a unit of a block; the stage of the next one.

        Args:
            ask: for later weights, called when no product reads registers of the unit before any more: those may be operands themselves.
        """
        layout, shape, count = self.layout, self._shape, len(tiles)
        sides, groups, steps = self._sides[side], layout.block_groups, STEPS // layout.units
        exact = self._folds
        batch = min(shape.batch, steps, STEPS // groups if exact else steps, STEPS // shape.stages_of_block)
        a = [local(4 * count * batch, "uint32") for _ in range(2)]
        for first in range(0, steps, batch):
            own, step = a[first // batch % 2], unit * steps + first
            for inner in range(batch):
                group = (step + inner) * groups // STEPS
                for m in range(count):
                    target = at(own, 4 * (inner * count + m))
                    words = at(self._words[which % self._depth], m * layout.unit_words)
                    dequantize(layout, target, words, first + inner, self.zeros(place, tiles[m], block, self._lane, group), layout.units)
                    if layout.coded is not None and not exact and not self._late:
                        terms = 2 if layout.bits >= PRECISE_BITS else 1
                        factors = local(2 * terms, "uint32")
                        self.factors(factors, sides, m * layout.side_words, group, terms)
                        scale(target, [factors[i] for i in range(2 * terms)])
            following = activations.part(block, place.blocks, step)
            stage = stage if following is None else following
            wgmma_fence()
            for inner in range(batch):
                begins = (step + inner) * groups % STEPS == 0
                for index in range(shape.terms):
                    add = const(int(not (exact and begins and index == 0)), "int32")
                    b = activations.operand(stage, step + inner, index)
                    multiply(self._columns, count, at(parts, 0), shape.sums, at(own, 4 * inner * count), b, add)
            wgmma_commit()
            if exact and (step + batch) * groups % STEPS == 0:
                wgmma_wait(0)
                pin(at(parts, 0), count * shape.sums)
                self._fold(sums, parts, sides, (step + batch - 1) * groups // STEPS, count, shape.sums)
            else:  # what the next batch but one overwrites is free
                wgmma_wait(1)
            if first == 0 and ask is not None:
                ask()
            activations.passed(block, step)
        return stage

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
