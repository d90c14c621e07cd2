"""The inner kernel: a few tiles of 16 rows times a few tokens, accumulated in registers over the whole of K.

Codes are unpacked in registers to pairs of 16-bit integers, once for all tokens of the tile; a pair of activations is broadcast to
all rows. At the end of each group the int32 sums are scaled into float32 sums.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tvm.tirx.script import builder as T

from moec.targets.kernels.cpu.activations import Activations
from moec.targets.kernels.cpu.codes import Run, prefetch_chunk, read_run, runs
from moec.targets.kernels.cpu.emit import E4M3_UNIT, Buffer, Expr, Register, argument, lane_type, splat, to_float, vector, when
from moec.targets.kernels.cpu.isa import DOTS, Isa, multiply_add
from moec.targets.kernels.cpu.layout import FLOAT_STORAGE, LANES, LaneLayout

CHAINS = 8  # independent accumulators that hide the latency of a multiply-add


class Rows(NamedTuple):
    """A vector of rows: the tile's index in the weight arrays (leading axes and tile) and the first lane within it."""

    tile: tuple[Expr, ...]
    lane: int


Epilogue = Callable[[int, int, int, Expr], None]
"""Takes (which tile, first lane, which token, float32 sums [lanes])."""


@dataclass(frozen=True)
class RegisterTile:
    """Emits the inner kernel for the weights of a layout."""

    layout: LaneLayout
    isa: Isa
    weights: Mapping[str, Buffer]
    activations: Activations

    def emit(self, tiles: Sequence[tuple[Expr, ...]], tokens: Sequence[Expr], epilogue: Epilogue) -> None:
        """Multiply `tiles` (indices of the weight arrays) with the rows `tokens` of the activations.

        A single token is bound by memory: it takes the tiles in turn, as one stream is faster than two.
        """
        if len(tokens) > 1:
            self._emit(0, tiles, tokens, epilogue)
            return
        for which, tile in enumerate(tiles):
            self._emit(which, [tile], tokens, epilogue)

    def _emit(self, first: int, tiles: Sequence[tuple[Expr, ...]], tokens: Sequence[Expr], epilogue: Epilogue) -> None:
        lanes = self.isa.lanes
        rows = [Rows(tile, lane) for tile in tiles for lane in range(0, LANES, lanes)]
        sums = [[Register("float32", lanes) for _ in tokens] for _ in rows]
        for register in (r for row in sums for r in row):
            register.clear()
        accumulate = self._integer if self.layout.integer else self._float
        accumulate(rows, tokens, sums)
        parts = LANES // lanes
        for t in range(len(tokens)):
            for r, row in enumerate(rows):
                epilogue(first + r // parts, row.lane, t, sums[r][t].get())

    def _integer(self, rows: list[Rows], tokens: Sequence[Expr], sums: list[list[Register]]) -> None:
        integer, lanes, act = self.layout.integer, self.isa.lanes, self.activations
        assert integer is not None
        chains = max(1, CHAINS // (len(rows) * len(tokens)))
        partial = [[[Register("int32", lanes) for _ in range(chains)] for _ in tokens] for _ in rows]
        chunk_steps = self.layout.chunk // 2
        parts, chunks = max(1, self.layout.chunk // act.group), max(1, act.group // self.layout.chunk)  # one of them is 1
        with T.serial(act.groups // parts) as outer:
            for part in range(parts):
                g = T.Bind(outer * parts + part)
                self._start(rows, tokens, partial, g)
                with T.serial(chunks) as c:
                    chunk = T.Bind(outer * chunks + c)
                    if part == 0:
                        self._prefetch(rows, chunk)
                    for run in runs(self.layout, part, parts):
                        with T.serial(run.repeats) as turn:
                            first = T.Bind(chunk * chunk_steps + run.first + turn * run.steps)
                            self._run(rows, tokens, partial, chunk, run, turn, first)
                self._finish(rows, tokens, partial, sums, g)

    def _prefetch(self, rows: list[Rows], chunk: Expr) -> None:
        for row in rows:
            if row.lane == 0:
                prefetch_chunk(self.layout, self.weights["codes"], row.tile, chunk)

    def _run(
        self, rows: list[Rows], tokens: Sequence[Expr], partial: list[list[list[Register]]], chunk: Expr, run: Run, turn: Expr, first: Expr
    ) -> None:
        """Add the products of a run, whose activations begin at the word `first`."""
        lanes, act, dot = self.isa.lanes, self.activations, DOTS[self.isa.dot]
        codes = [read_run(self.layout, self.weights["codes"], row.tile, chunk, run, turn, row.lane, lanes) for row in rows]
        for step in range(run.steps):
            pairs = [T.Bind(read(step)) for read in codes]
            for t, token in enumerate(tokens):
                x = T.Bind(splat(act.q.load(token, first + step, first=step + t == 0), "int32", lanes))
                for r, pair in enumerate(pairs):
                    chains = partial[r][t]
                    register = chains[step % len(chains)]
                    register.set(dot(register.get(), pair, x, lanes))

    def _weight_group(self, g: Expr) -> Expr:
        """The weights' group that holds the g-th group of activations."""
        group = g // (self.layout.group // self.activations.group)
        whole = self.layout.group * self.layout.groups == self.layout.padded_k
        return group if whole else T.min(group, self.layout.groups - 1)  # beyond K activations are zero

    def _start(self, rows: list[Rows], tokens: Sequence[Expr], partial: list[list[list[Register]]], g: Expr) -> None:
        """Start a group's sums at -zero * (sum of activations)."""
        integer, lanes = self.layout.integer, self.isa.lanes
        assert integer is not None
        for r, row in enumerate(rows):
            if integer.symmetric:
                zero = splat(-integer.middle, "int32", lanes)
            else:
                stored = vector(self.weights["zero"], *row.tile, self._weight_group(g), row.lane, lanes=lanes)
                zero = T.Bind(splat(0, "int32", lanes) - T.cast(stored, lane_type("int32", lanes)))
            for t, token in enumerate(tokens):
                first, *others = partial[r][t]
                first.set(zero * splat(self.activations.sum.load(token, g, first=r + t == 0), "int32", lanes))
                for register in others:
                    register.clear()

    def _finish(
        self,
        rows: list[Rows],
        tokens: Sequence[Expr],
        partial: list[list[list[Register]]],
        sums: list[list[Register]],
        g: Expr,
    ) -> None:
        """Scale a group's integer sums and add them to the float32 sums."""
        lanes = self.isa.lanes
        for r, row in enumerate(rows):
            stored = vector(self.weights["scale"], *row.tile, self._weight_group(g), row.lane, lanes=lanes)
            scale = T.Bind(to_float(stored, "float16", lanes))
            for t, token in enumerate(tokens):
                total = partial[r][t][0].get()
                for register in partial[r][t][1:]:
                    total = total + register.get()
                factor = scale * splat(self.activations.scale.load(token, g, first=r + t == 0), "float32", lanes)
                value = T.cast(total, lane_type("float32", lanes))
                sums[r][t].set(multiply_add(self.isa, value, factor, sums[r][t].get()))

    def _float(self, rows: list[Rows], tokens: Sequence[Expr], sums: list[list[Register]]) -> None:
        lanes, layout = self.isa.lanes, self.layout
        if layout.fp8 is None:
            self._add_values(rows, tokens, sums, 0, layout.k)
            return
        size = layout.fp8.group_size(layout.k)
        partial = [[Register("float32", lanes) for _ in tokens] for _ in rows]
        with T.serial(layout.groups) as g:
            for register in (r for row in partial for r in row):
                register.clear()
            self._add_values(rows, tokens, partial, g * size, T.min(size, layout.k - g * size))
            for r, row in enumerate(rows):
                scale = vector(self.weights["scale"], *row.tile, g, row.lane, lanes=lanes)
                factor = T.Bind(scale * splat(E4M3_UNIT, "float32", lanes))
                for t in range(len(tokens)):
                    sums[r][t].set(multiply_add(self.isa, partial[r][t].get(), factor, sums[r][t].get()))

    def _add_values(self, rows: list[Rows], tokens: Sequence[Expr], sums: list[list[Register]], first: Expr, count: Expr) -> None:
        """sums += the products of `count` columns from `first` on, scales left out."""
        lanes = self.isa.lanes
        storage = FLOAT_STORAGE[self.layout.format]
        with T.serial(count) as i:
            k = T.Bind(first + i) if self.layout.fp8 else i
            values = []
            for row in rows:
                stored = vector(self.weights["values"], *row.tile, k, row.lane, lanes=lanes)
                values.append(T.Bind(to_float(stored, storage, lanes)))
            for t, token in enumerate(tokens):
                x = T.Bind(splat(self.activations.values[token, k], "float32", lanes))
                for r, value in enumerate(values):
                    sums[r][t].set(multiply_add(self.isa, value, x, sums[r][t].get()))


def token_tiles(count: Expr, most: int, body: Callable[[Expr, int], None]) -> None:
    """Cut `count` tokens into register tiles: `body(first, size)` with sizes of at most `most`, a power of two."""
    with T.serial(count // most) as i:
        body(i * most, most)
    if isinstance(count, int):
        if rest := count % most:
            body(count - rest, rest)
        return
    size = most // 2
    while size:
        with when(T.bitwise_and(count, size) != 0):
            body(count // (2 * size) * (2 * size), size)
        size //= 2


def weight_arguments(layout: LaneLayout, *lead: int, prefix: str = "") -> dict[str, Buffer]:
    """The arrays of a weight as the next parameters of the function being built."""
    return {name: argument(prefix + name, shape, dtype) for name, (shape, dtype) in layout.arrays(*lead).items()}
