"""The product of 256 packed rows of E4M3 with E4M3 activations, on the tensor cores of compute capability 9.0.

Codes go from memory to operand A as they are: nothing is dequantised. Sums of a block of 128 columns are multiplied in float32 by the
scale of the token's block, and of the weights' block where those have one for each, and are added up: the tensor cores keep too few bits
of E4M3 products for longer sums (arXiv 2412.19437, "Increasing Accumulation Precision"). What has one scale a row is scaled by it at the
end.
"""

from __future__ import annotations

from tvm.tirx.script import builder as T

from moec.runtime.errors import MoecError
from moec.targets.kernels.cuda.copies import copy_commit, copy_wait, copy_words, shared_address
from moec.targets.kernels.cuda.emit import Buffer, Expr, at, const, local, store, when
from moec.targets.kernels.cuda.experts_layout import Stack
from moec.targets.kernels.cuda.loads import read_words
from moec.targets.kernels.cuda.matrix import pin, wgmma_commit, wgmma_e4m3, wgmma_fence, wgmma_wait
from moec.targets.kernels.cuda.narrow import NarrowImages
from moec.targets.kernels.cuda.registers import Registers
from moec.targets.kernels.cuda.shape import NarrowShape
from moec.targets.kernels.cuda.stored import Place, Stored

STEPS = 4  # products of 32 columns in a block
WORDS = 16  # of a lane, of a block of 16 rows


class NarrowProduct(Stored):
    """The arrays of the experts of one format."""

    def __init__(self, stack: Stack, index: int, prefix: str) -> None:
        super().__init__(stack, index, prefix)
        if self.layout.fp8 is None:
            raise MoecError(f"no CUDA kernel for {self.layout.format} with fp8 activations: expected fp8_channel or fp8_block128")

    def sizes(self, shape: NarrowShape) -> tuple[int, int]:
        """Of the sets of `Registers`."""
        return (1 if shape.ring else shape.tiles) * WORDS, 2 * shape.tiles

    def prepare(self, shape: NarrowShape, thread: Expr, ring: Buffer | None, registers: Registers) -> None:
        self._shape, self._thread, self._lane, self._ring = shape, thread, T.Bind(thread % 32), ring
        self._turn = 2 if ring is not None else shape.depth  # blocks whose registers are apart
        sets = 1 if ring is not None else shape.depth
        self._words, self._sides = registers.words(sets), registers.sides(1 if self._late else self._turn)
        self._a = [local(WORDS, "uint32") for _ in range(shape.buffers)]
        self._parts = [local(shape.chunk // 2, "float32") for _ in range(shape.buffers)]

    @property
    def _late(self) -> bool:
        """Whether there is one scale a row, which sums are multiplied with at the end."""
        return self.layout.per_row

    def begin(self, place: Place, tiles: list[Expr]) -> None:
        first = const(0, "int32")
        self._fetch_sides(0, place, tiles, first)
        for block in range((self._shape.ring or self._shape.depth) - 1):
            with when(const(block, "int32") < place.blocks):
                self._fetch(block, place, tiles, const(block, "int32"))
                if block and self._ring is None and not self._late:
                    self._fetch_sides(block, place, tiles, const(block, "int32"))
            if self._ring is not None:
                copy_commit()

    def run(self, place: Place, tiles: list[Expr], activations: NarrowImages, sums: Buffer, columns: int) -> None:
        blocks, shape = place.blocks, self._shape
        for i in range(len(tiles) * shape.sums):
            store(sums, const(0.0, "float32"), i)
        ahead = (shape.ring or shape.depth) - 1
        with T.serial((blocks + self._turn - 1) // self._turn) as i:
            for j in range(self._turn):
                block = T.Bind(i * self._turn + j)
                with when(block < blocks):
                    stage = activations.step(block, blocks)
                    with when(block + ahead < blocks):
                        self._fetch(j + ahead, place, tiles, block + ahead)
                    if self._ring is not None:
                        copy_commit()
                        copy_wait(ahead)
                    if not self._late:
                        later = 1 if self._ring is not None else ahead
                        with when(block + later < blocks):
                            self._fetch_sides(j + later, place, tiles, block + later)
                    self._block(j, block, len(tiles), activations, stage, sums, columns)
                    with when(block < blocks - 1):
                        activations.release(block)
        activations.finish(blocks)
        if self._late:
            for m in range(len(tiles)):
                for i in range(shape.sums):
                    index = m * shape.sums + i
                    store(sums, sums[index] * self._scale(0, m, i % 4 // 2), index)

    def _slot(self, block: Expr, m: int, first: int) -> Expr:
        """Where in the ring a thread has 4 words of a tile's block: those of all threads follow each other."""
        return T.cast(
            ((block % self._shape.ring * self._shape.tiles + m) * WORDS + first) * self._shape.threads + self._thread * 4, "int32"
        )

    def _fetch(self, which: int, place: Place, tiles: list[Expr], block: Expr) -> None:
        """Ask for the words of a block."""
        for m, tile in enumerate(tiles):
            if self._ring is None:
                self.fetch(self._words[which % self._turn], m * WORDS, place, tile, block, self._lane)
                continue
            for first, count, source in self.sources(place, tile, block, self._lane):
                copy_words(shared_address(at(self._ring, self._slot(block, m, first))), source, count)

    def _fetch_sides(self, which: int, place: Place, tiles: list[Expr], block: Expr) -> None:
        for m, tile in enumerate(tiles):
            self.fetch_scales(self._sides[which % len(self._sides)], 2 * m, place, tile, block, self._lane)

    def _scale(self, which: int, m: int, half: int) -> Expr:
        return T.reinterpret("float32", self._sides[which % len(self._sides)][2 * m + half])

    def _block(self, j: int, block: Expr, count: int, activations: NarrowImages, stage: Expr, sums: Buffer, columns: int) -> None:
        """Multiply with a block, some columns of a tile at a time, and add up what others gave meanwhile."""
        shape = self._shape
        items = [(m, first) for m in range(count) for first in range(0, columns, shape.chunk)]
        for i, (m, first) in enumerate(items):
            if first == 0:
                self._operand(j, block, m)
            size, parts = min(shape.chunk, columns - first), self._parts[i % shape.buffers]
            wgmma_fence()
            for step in range(STEPS):
                b = activations.operand(stage, step, first)
                wgmma_e4m3(size, at(parts, 0), at(self._a[m % len(self._a)], 4 * step), b, const(int(step > 0), "int32"))
            wgmma_commit()
            if i >= shape.buffers - 1:
                wgmma_wait(shape.buffers - 1)
                self._fold(j, i + 1 - shape.buffers, items, activations, stage, sums, columns)
        if shape.buffers > 1:
            wgmma_wait(0)
            self._fold(j, len(items) - 1, items, activations, stage, sums, columns)

    def _operand(self, j: int, block: Expr, m: int) -> None:
        """The words of a tile in the order of operand A: of step s those of columns 32 s and 32 s + 16, of both rows in turn."""
        words, first = self._words[0 if self._ring is not None else j % self._turn], 0 if self._ring is not None else m * WORDS
        if self._ring is not None:
            for word in range(0, WORDS, 4):
                read_words(at(words, word), at(self._ring, self._slot(block, m, word)), 4)
        for step in range(STEPS):
            for r in range(4):
                store(self._a[m % len(self._a)], words[first + r % 2 * (WORDS // 2) + 2 * step + r // 2], 4 * step + r)

    def _fold(
        self, j: int, i: int, items: list[tuple[int, int]], activations: NarrowImages, stage: Expr, sums: Buffer, columns: int
    ) -> None:
        """Add up what item i gave, times the scales."""
        shape, (m, first), scales = self._shape, items[i], local(2, "float32")
        size, parts = min(shape.chunk, columns - first), self._parts[i % shape.buffers]
        pin(at(parts, 0), size // 2)
        for n in range(size // 8):
            activations.scales(scales, stage, first + n * 8 + self._thread % 4 * 2)
            for r in range(4):
                factor = scales[r % 2] if self._late else scales[r % 2] * self._scale(j, m, r // 2)
                index = m * shape.sums + first // 2 + 4 * n + r
                store(sums, sums[index] + parts[4 * n + r] * factor, index)
