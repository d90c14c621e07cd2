"""The matrices of one format that `projections` multiplies with."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

from tvm.tirx.script import builder as T

from moec.targets.kernels.cuda.emit import Buffer, Expr, at, const, local, store, when
from moec.targets.kernels.cuda.intrinsics import call
from moec.targets.kernels.cuda.layout import FragmentLayout, ceil_div
from moec.targets.kernels.cuda.matrices import SameFormat
from moec.targets.kernels.cuda.projections_columns import Columns
from moec.targets.kernels.cuda.projections_product import Activations, Bfloat16, FixedPoint, Part, clear
from moec.targets.kernels.cuda.projections_row import Row
from moec.targets.kernels.cuda.stored import FIRST, Stored

if TYPE_CHECKING:
    from moec.targets.kernels.cuda.projections import ProjectionsSpec

MOST_TOGETHER = 4  # fragments of sums whose products take turns, so that none waits for the one before it
MOST_HELD = 2  # blocks of activations that stay in registers


class _Picked(Stored):
    """The arrays of the matrix that a block of threads has."""

    early = True

    def __init__(self, layout: FragmentLayout, buffers: dict[str, Buffer]) -> None:
        self.layout, self._buffers = layout, buffers


def pick(which: Expr, buffers: Sequence[Buffer], shape: tuple[int, ...], dtype: str) -> Buffer:
    """One of several arrays, as an array of the shape of the largest."""
    parameters = "".join(f", const void* p{i}" for i in range(len(buffers)))
    chain = "".join(f"i == {i} ? p{i} : " for i in range(len(buffers) - 1)) + f"p{len(buffers) - 1}"
    name = f"moec_pick{len(buffers)}"
    source = f"__device__ __forceinline__ const void* {name}(int i{parameters}) {{ return {chain}; }}\n"
    found = T.Bind(call(name, source, which, *(at(b, *[0] * len(b.shape)) for b in buffers), result="handle"))
    return T.decl_buffer(shape, dtype, data=found, layout=None)


class Matrices(SameFormat):
    """Some matrices of a format: their products with a row of each token, tile by tile.

    A warp has `tiles` tiles and `share` blocks of columns of each. It goes through them in rounds, each of `wide` tiles and `deep` blocks,
    whose weights are in registers; the next round's are asked for as soon as a tile's are used. With fewer bytes under way than a tile
    has, a tile takes `turns` rounds.

    Args:
        members: which of the spec's matrices.
        arrays, biases, outs: the parameters, of all matrices.
    """

    def __init__(
        self, spec: ProjectionsSpec, members: Sequence[int], arrays: Sequence[dict[str, Buffer]], biases: Sequence[Buffer | None],
        outs: Sequence[Buffer],
    ) -> None:  # fmt: skip
        super().__init__(spec, members, arrays, biases, outs)
        self.spec = spec
        self._words, self._groups = self._layout.block_words // 32, self._layout.block_groups
        share, depth = ceil_div(spec.blocks, spec.splits), max(1, spec.unroll // (4 * self._words))
        self._turns = ceil_div(share, depth)
        self._deep = ceil_div(share, self._turns)
        self._wide = max(1, min(depth // share, spec.tiles))
        self._rounds = ceil_div(spec.tiles, self._wide) * self._turns
        self._exact = spec.blocks % spec.splits == 0 and share == self._deep * self._turns
        self._kind: type[FixedPoint | Bfloat16] = FixedPoint if self._layout.integer is not None else Bfloat16
        self._columns = Columns(spec.tokens, self._kind.terms)
        # Where weights are still to be asked for, which happens when all of these are used, memory must not wait.
        self._together = min(len(self._slots), max(1, MOST_TOGETHER // self._columns.fragments) if self._rounds == 1 else 1)
        self._held = self._turns == 1 and self._deep <= MOST_HELD

    @property
    def _slots(self) -> list[tuple[int, int]]:
        """The parts of a round: (tile, block), those first that have the same activations."""
        return [(tile, block) for block in range(self._deep) for tile in range(self._wide)]

    @property
    def _sums(self) -> int:
        """Sums of a lane in a round: [tile, half, token]."""
        return 2 * self._wide * self._columns.own

    def begin(self, part: Expr, thread: Expr, row: Row) -> None:
        """Ask for the first weights of a block of threads, number `part` of those that these matrices have, and for the row's."""
        spec = self.spec
        self._choose(part)
        self._thread, self._lane = thread, T.Bind(thread % 32)
        warp = T.Bind(thread // 32)
        self._split, self._own = T.Bind(warp % spec.splits), T.Bind(warp // spec.splits * spec.tiles)
        self._start = T.Bind(self._split * spec.blocks // spec.splits)
        self._stop = T.Bind((self._split + 1) * spec.blocks // spec.splits)
        count = len(self._slots)
        self._codes = local(count * self._words, "uint32")
        self._sides = local(count * self._layout.side_words, "uint32")
        integer = self._layout.integer
        self._zeros = None if integer is None or integer.symmetric else local(count * self._groups * 2, "uint32")
        for slot in range(count):
            self._fetch(slot, 0)
        self._offsets = self._first_biases()
        row.begin(self._layout, thread, self._start, self._stop)

    def _choose(self, part: Expr) -> None:
        """Pick the arrays of the matrix that a block of threads has."""
        starts = [sum(self.spec.blocks_of(i) for i in self.members[:n]) for n in range(len(self.members))]
        which, first, rows = const(0, "int32"), const(0, "int32"), const(self._layouts[0].n, "int32")
        for n, start in enumerate(starts[1:], 1):
            later = part >= start
            which, first = T.Select(later, n, which), T.Select(later, start, first)
            rows = T.Select(later, self._layouts[n].n, rows)
        self._which, self._limit = T.Bind(which), T.Bind(rows)
        self._first_tile = T.Bind((part - first) * self.spec.block_tiles)
        self._last_tile = T.Bind((self._limit + 15) // 16 - 1)
        buffers = {
            name: pick(self._which, [arrays[name] for arrays in self._arrays], (1, *shape), dtype)
            for name, (shape, dtype) in self._layout.arrays().items()
        }
        self._weights = _Picked(self._layout, buffers)
        self._out = pick(self._which, self._outs, (1, self.spec.tokens * self._layout.n), "float32")

    def _block(self, slot: int, turn: Expr) -> Expr:
        """The block of columns of a slot in a round."""
        block = self._slots[slot][1]
        return self._start + (block if self._turns == 1 else turn % self._turns * self._deep + block)

    def _fetch(self, slot: int, turn: Expr) -> None:
        """Ask for the weights of a slot in a round. Past the end it is the last one again, which counts for nothing."""
        tile = T.Bind(T.min(self._first_tile + self._own + turn // self._turns * self._wide + self._slots[slot][0], self._last_tile))
        block = self._block(slot, turn)
        block = T.Bind(block if self._exact else T.min(block, self._stop - 1))
        self._weights.fetch(self._codes, slot * self._words, FIRST, tile, block, self._lane)
        self._weights.fetch_scales(self._sides, slot * self._layout.side_words, FIRST, tile, block, self._lane)
        if self._zeros is not None:
            for group in range(self._groups):
                for half, zero in enumerate(self._weights.zeros(FIRST, tile, block, self._lane, group)):
                    store(self._zeros, zero, 2 * (slot * self._groups + group) + half)

    def multiply(self, row: Row, partial: Buffer) -> None:
        """partial[split, row, token] = the products with the staged rows."""
        self._products = self._kind(self._layout, row, self._lane, self._columns)
        held = {block: self._activations(block, 0) for block in range(self._deep)} if self._held else None
        sums = local(self._sums, "float32")
        if self._rounds == 1:
            self._round(0, sums, partial, held)
            return
        with T.serial(self._rounds) as turn:
            self._round(turn, sums, partial, held)

    def _activations(self, block: int, turn: Expr) -> Activations:
        """The B fragments of a block of columns of a round."""
        inside = block if self._turns == 1 else T.Bind(turn % self._turns * self._deep + block)
        missing = None if self._exact else T.Bind(self._start + inside >= self._stop)
        return self._products.activations(inside if self._exact else T.min(inside, self._stop - self._start - 1), missing)

    def _round(self, turn: Expr, sums: Buffer, partial: Buffer, held: dict[int, Activations] | None) -> None:
        if self._turns == 1:
            clear(sums, self._sums)
        else:
            with when(turn % self._turns == 0):
                clear(sums, self._sums)
        for first in range(0, len(self._slots), self._together):
            some = range(first, min(first + self._together, len(self._slots)))
            blocks = dict.fromkeys(self._slots[slot][1] for slot in some)
            activations = held if held is not None else {block: self._activations(block, turn) for block in blocks}
            parts = [Part(at(self._codes, slot * self._words), slot * self._layout.side_words, *self._slots[slot]) for slot in some]
            self._products.add(parts, activations, sums, self._sides, self._zeros)
            if self._rounds > 1:
                with when(turn + 1 < self._rounds):
                    for slot in some:
                        self._fetch(slot, turn + 1)
        if self._turns == 1:
            self._save(turn, sums, partial)
        else:
            with when(turn % self._turns == self._turns - 1):
                self._save(turn, sums, partial)

    def _save(self, turn: Expr, sums: Buffer, partial: Buffer) -> None:
        """Keep the sums of a round's tiles."""
        for tile in range(self._wide):
            place = T.Bind(turn // self._turns * self._wide + tile)
            own, tokens, t = self._columns.own, self.spec.tokens, self._lane % 4
            totals = [self._products.total(sums[2 * own * tile + i]) for i in range(2 * own)]
            wanted = self._columns.whole(t)
            if self._rounds > 1 and self.spec.tiles % self._wide:
                inside = place < self.spec.tiles
                wanted = inside if wanted is None else T.And(wanted, inside)
            with when(wanted) if wanted is not None else nullcontext():
                for half in range(2):
                    row = (self._own + place) * 16 + half * 8 + self._lane // 4
                    for which in range(own):
                        store(partial, totals[half * own + which], self._split, row * tokens + self._columns.token(t, which))

    def _result(self, i: int) -> tuple[Expr, Expr, Expr]:
        """The i-th result of a thread: which of the block's, the row of the matrix, and the token."""
        here, tokens = i * self.spec.threads + self._thread, self.spec.tokens
        return here, self._first_tile * 16 + here // tokens, here % tokens

    def _wanted(self, i: int) -> Expr:
        here, row, _ = self._result(i)
        inside, results = row < self._limit, self.spec.outputs * self.spec.tokens
        return inside if (i + 1) * self.spec.threads <= results else T.And(here < results, inside)

    @property
    def _results(self) -> int:
        """Results of a thread at most."""
        return ceil_div(self.spec.outputs * self.spec.tokens, self.spec.threads)

    def _first_biases(self) -> Buffer | None:
        """The biases of a thread's results."""
        if not any(bias is not None for bias in self._biases):
            return None
        found = local(self._results, "float32")
        clear(found, self._results)
        for n, bias in enumerate(self._biases):
            if bias is not None:
                for i in range(self._results):
                    with when(T.And(self._which == n, self._wanted(i))):
                        store(found, bias[self._result(i)[1]], i)
        return found

    def finish(self, partial: Buffer, factor: Expr | None) -> None:
        """After a barrier: add up what the warps have, and write it."""
        for i in range(self._results):
            here, row, token = self._result(i)
            with when(self._wanted(i)):
                total = sum((partial[split, here] for split in range(1, self.spec.splits)), partial[0, here])
                total = total if factor is None else total * factor
                store(self._out, total if self._offsets is None else total + self._offsets[i], 0, token * self._limit + row)
