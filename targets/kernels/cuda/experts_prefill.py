"""The experts of many tokens: tokens are sorted by expert, and two grouped products run over tiles of tokens of one expert.

sort      positions of slots (a token and one of its experts) by expert, and where each expert begins
gate_up   hidden [position, F] in bfloat16 of tokens gathered from x
down      y [position, D] times the routing weight
combine   the sum of each token's slots
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from moec.targets.kernels.cpu.activation_functions import ExpertActivation
from moec.targets.kernels.cuda.activation import gated, plain
from moec.targets.kernels.cuda.emit import Buffer, Expr, Shared, argument, at, const, kernel, local, store, strided, sync, when
from moec.targets.kernels.cuda.experts_layout import ExpertsLayout
from moec.targets.kernels.cuda.image import Images, clear, cluster_ready, place
from moec.targets.kernels.cuda.intrinsics import grid_launch, grid_wait, read_words, term
from moec.targets.kernels.cuda.layout import BLOCK, ROWS, ceil_div
from moec.targets.kernels.cuda.matrix import shared_address, store_matrix
from moec.targets.kernels.cuda.product import THREADS, Activations, Shape, Weights
from moec.targets.kernels.cuda.sort import most_tiles
from moec.targets.kernels.cuda.tiles import Tile, each_tile

TOGETHER = 8
"""Tiles of tokens that run with the same rows of weights at about the same time, where there are many."""


@dataclass(frozen=True)
class PrefillSpec:
    """The kernels for many tokens of a layer.

    Args:
        tokens: T, None for any number.
        dtype: of the result and of what the slots give, `float32` or `bfloat16`; x is bfloat16, `shape.terms` of them.
        shape: the size of a block's product.
    """

    layout: ExpertsLayout
    activation: ExpertActivation
    tokens: int | None
    top_k: int
    ids_dtype: str = "int64"
    biases: bool = False
    dtype: str = "float32"
    shape: Shape = field(default_factory=Shape)

    def count(self) -> Expr:
        """T, a new variable if it is any number."""
        return self.tokens if self.tokens is not None else T.int64()

    def sorted(self, tokens: Expr) -> tuple[Buffer, Buffer]:
        """The parameters that `sort` writes."""
        slots = tokens * self.top_k
        order = argument("order", (slots,), "int32")
        return order, argument("tiles", (most_tiles(slots, self.layout.experts, self.shape.tokens) + 1, 4), "int32")

    @property
    def cluster(self) -> int:
        """Blocks of threads of a cluster."""
        return max(self.shape.cluster, 1)

    def grid(self, rows: int, tokens: Expr) -> list[Expr]:
        """Blocks of threads: as many as run at once, or fewer if there is less to do."""
        parts, each = ceil_div(rows, self.shape.rows), self.cluster
        work = most_tiles(tokens * self.top_k, self.layout.experts, self.shape.tokens) * ceil_div(parts, each)
        if most := self.shape.multiprocessors * self.shape.residency // each:
            work = min(work, most) if isinstance(work, int) else T.min(work, most)
        return [work * each if isinstance(work, int) else T.cast(work * each, "int32")]

    def image(self, name: str, tokens: Expr, columns: int) -> Buffer:
        """The parameter of an image of so many columns (see `image`)."""
        most = most_tiles(tokens * self.top_k, self.layout.experts, self.shape.tokens)
        return argument(name, (most, ceil_div(columns, BLOCK), self.shape.tokens * BLOCK), "uint16")

    def activations(self, name: str, tokens: Expr, rows: Expr, columns: int) -> Buffer:
        """The parameter of activations [terms, rows, columns], or of their image."""
        if self.shape.cluster:
            assert self.shape.terms == 1 and self.shape.tiles == 2  # whole blocks of hidden values are written
            return self.image(name, tokens, columns)
        return argument(name, (self.shape.terms, rows, columns), "uint16")


def barrier_words(shape: Shape) -> int:
    """Words of the barriers of the stages."""
    return 4 * shape.stages if shape.cluster else 0


def gate_up_func(spec: PrefillSpec) -> tirx.PrimFunc:
    """PrimFunc (x uint16 [terms, T, D], order [S], tiles [most + 1, 4], arrays..., [bias], hidden uint16 [terms, S, F]).

    Of a shape with a cluster, hidden is an image, and one of x comes after x.
    """
    layout, stack, shape = spec.layout, spec.layout.gate_up, spec.shape
    rows = layout.f_tiles * ROWS
    parts, staged_words = ceil_div(rows, shape.rows), 2 * shape.tokens * (2 * layout.tile_rows + 4)

    def arguments() -> tuple[Any, ...]:
        tokens = spec.count()
        x = argument("x", (shape.terms, tokens, layout.d), "uint16")  # of an image's tokens it says how many
        if shape.cluster:
            x = spec.image("image", tokens, layout.d)
        order, tiles = spec.sorted(tokens)
        weights = Weights(stack, "gate_up_")
        bias = argument("gate_up_bias", (layout.experts, stack.n), "float32") if spec.biases else None
        return x, order, tiles, weights, bias, spec.activations("hidden", tokens, tokens * spec.top_k, layout.padded_f), tokens

    def body(operands: tuple[Any, ...], memory: Shared, block: Expr, thread: Expr) -> None:
        x, order, tiles, weights, bias, hidden, tokens = operands
        ring, staged = memory.take((shape.words,), "uint32"), memory.take((staged_words,), "uint32")
        warp, lane, group = T.Bind(thread // 32 % 4), T.Bind(thread % 32), T.Bind(thread // 128)
        barriers, rank = memory.take((barrier_words(shape),), "uint32"), T.Bind(block % spec.cluster)
        grid_wait()
        grid_launch()
        tile, sums = Tile(tiles, parts, spec.cluster, rank, TOGETHER if shape.tiles > 1 else 1), local(shape.tiles * shape.sums, "float32")
        if shape.cluster:
            activations: Activations | Images = Images(shape, ring, barriers, x, thread, rank)
        else:
            activations = Activations(shape, ring, x, layout.d, thread)
        weights.prepare(shape, lane)

        def rows_of(part: Expr) -> list[Expr]:
            return shape.row_tiles(shape.first_tile(part, group, warp), layout.f_tiles - 1)

        def begin(_: bool) -> None:
            expert, first, count, part, number = tile.now()
            weights.begin(expert, rows_of(part))
            if isinstance(activations, Images):
                activations.locate(number, count)
            else:
                activations.locate(lambda token: order[first + token] // spec.top_k, count)
            activations.begin(weights.blocks)

        def run() -> None:
            expert, _, _, part, _ = tile.now()
            weights.run(expert, rows_of(part), activations, sums)

        def finish() -> None:
            expert, first, count, part, number = tile.kept()
            base = T.Bind(shape.first_tile(part, group, warp))
            _hidden(spec, sums, staged, hidden, bias, expert, first, count, part, number, base, thread)

        total = T.Bind(tiles[tiles.shape[0] - 1, 0] * tile.parts)
        each_tile(tile, total, block // spec.cluster, spec.grid(rows, tokens)[0] // spec.cluster, begin, run, finish)
        if shape.cluster:
            cluster_ready()  # its memory is not written any more

    def grid(operands: tuple[Any, ...]) -> list[Expr]:
        return spec.grid(rows, operands[-1])

    words = shape.words + staged_words + barrier_words(shape)
    return kernel("gate_up", THREADS, arguments, grid, body, words=words, blocks_per_multiprocessor=shape.residency, cluster=spec.cluster)


def _hidden(
    spec: PrefillSpec, sums: Buffer, memory: Buffer, hidden: Buffer, bias: Buffer | None, expert: Expr, first: Expr, count: Expr,
    part: Expr, number: Expr, base: Expr, thread: Expr,
) -> None:  # fmt: skip
    """Apply the activation function and write hidden values, by way of shared memory, 16 bytes at a time."""
    layout, shape = spec.layout, spec.shape
    warp, lane, group = thread // 32 % 4, thread % 32, thread // 128
    per = 4 * layout.tile_rows  # hidden values of a warpgroup for 64 rows
    width = per // 2 + 4  # words of a token, padded against conflicts
    staged = T.Bind(group * shape.tokens * width)
    own = T.Bind(staged + lane % 4 * 2 * width + (warp * layout.tile_rows + lane // 4) // 2)
    for m in range(shape.tiles):
        tile = T.Bind(base + 4 * m)
        for index in range(shape.terms):
            if shape.terms == 1:
                hidden_of = partial(_hidden_values, spec, sums, m, tile, bias, expert, lane)
                _store(shape.tokens // 8, 1 if layout.gated else 2, hidden_of, memory, staged + warp * (layout.tile_rows // 2), width, lane)
            else:
                for n in range(shape.tokens // 8):
                    for c in range(2):
                        for half, out in enumerate(_hidden_values(spec, sums, m, tile, bias, expert, lane, n, c)):
                            other = T.Bind(T.tvm_warp_shuffle_down(tirx.const(0xFFFFFFFF, "uint32"), out, 4, 32, 32))
                            with when(lane // 4 % 2 == 0):
                                store(memory, term(out, other, index), own + ((n * 8 + c) * width + half * 4))
            sync()
            pieces = per // 8
            f0 = T.Bind((part * 8 * shape.tiles + group * 4 * shape.tiles + 4 * m) * layout.tile_rows)
            with strided(thread % 128, shape.tokens * pieces, 128) as i:
                token, piece = i // pieces, i % pieces
                f = f0 + piece * 8
                if shape.cluster:
                    with when(T.And(token < count, f < layout.padded_f)):
                        target = place(hidden, shape.tokens, number, token, f)
                        with T.If(f < layout.f):
                            with T.Then():
                                read_words(target, at(memory, staged + token * width + piece * 4))
                            with T.Else():
                                clear(target)
                else:
                    with when(T.And(token < count, f < layout.f)):
                        read_words(at(hidden, index, first + token, f), at(memory, staged + token * width + piece * 4))
            sync()


def _hidden_values(
    spec: PrefillSpec, sums: Buffer, m: int, tile: Expr, bias: Buffer | None, expert: Expr, lane: Expr, n: int, c: int
) -> list[Expr]:
    """The hidden values of a lane for one token: one where there is a gate, else of both rows."""
    layout = spec.layout
    values = []
    for half in range(2):
        value = sums[m * spec.shape.sums + 4 * n + 2 * half + c]
        if bias is not None:
            value = value + bias[expert, T.min(tile, layout.f_tiles - 1) * ROWS + half * 8 + lane // 4]
        values.append(T.Bind(value))
    outs = [gated(spec.activation, values[0], values[1])] if layout.gated else [plain(spec.activation, v) for v in values]
    return [T.Bind(out) for out in outs]


def _store(
    count: int, halves: int, values: Callable[[int, int], Sequence[Expr]], memory: Buffer, first: Expr, width: int, lane: Expr
) -> None:
    """Write a warp's numbers as bfloat16, a row of `width` words a token: 8 by 8 of them as a tile.

    Args:
        count: times 8 tokens.
        halves: of 8 numbers of a token; `values(n, c)` are those of token 8 n + 2 t + c, one of each half.
        first: the word at which the first token's begin.
    """
    n = 0
    while n < count:
        size = next(s for s in (4, 2, 1) if s <= count - n)
        packed = [local(size, "uint32") for _ in range(halves)]
        for i in range(size):
            for half, (low, high) in enumerate(zip(values(n + i, 0), values(n + i, 1), strict=True)):
                store(packed[half], term(low, high, 0), i)
        token = (n + lane // 8 % size) * 8 + lane % 8
        for half in range(halves):
            store_matrix(shared_address(at(memory, first + token * width + half * 4)), at(packed[half], 0), size)
        n += size


def down_func(spec: PrefillSpec) -> tirx.PrimFunc:
    """PrimFunc (hidden uint16 [terms, S, F], order [S], tiles [most + 1, 4], weights f32 [T, k], arrays..., [bias], y [S, D])."""
    layout, stack, shape = spec.layout, spec.layout.down, spec.shape
    parts, staged_words = ceil_div(layout.d, shape.rows), 2 * shape.tokens * ((64 if spec.dtype == "float32" else 32) + 4)

    def arguments() -> tuple[Any, ...]:
        tokens = spec.count()
        slots = tokens * spec.top_k
        hidden = spec.activations("hidden", tokens, slots, layout.padded_f)
        order, tiles = spec.sorted(tokens)
        routing_weights = argument("weights", (tokens, spec.top_k), "float32")
        weights = Weights(stack, "down_")
        bias = argument("down_bias", (layout.experts, layout.d), "float32") if spec.biases else None
        return hidden, order, tiles, routing_weights, weights, bias, argument("y", (slots, layout.d), spec.dtype), tokens

    def body(operands: tuple[Any, ...], memory: Shared, block: Expr, thread: Expr) -> None:
        hidden, order, tiles, routing_weights, weights, bias, y, tokens = operands
        ring, staged = memory.take((shape.words,), "uint32"), memory.take((staged_words,), "uint32")
        warp, lane, group = T.Bind(thread // 32 % 4), T.Bind(thread % 32), T.Bind(thread // 128)
        barriers, rank = memory.take((barrier_words(shape),), "uint32"), T.Bind(block % spec.cluster)
        tile, sums = Tile(tiles, parts, spec.cluster, rank, TOGETHER if shape.tiles > 1 else 1), local(shape.tiles * shape.sums, "float32")
        if shape.cluster:
            activations: Activations | Images = Images(shape, ring, barriers, hidden, thread, rank)
        else:
            activations = Activations(shape, ring, hidden, ceil_div(layout.f, 8) * 8, thread)
        weights.prepare(shape, lane)

        def rows_of(part: Expr) -> list[Expr]:
            return shape.row_tiles(shape.first_tile(part, group, warp), stack.classes[0].tiles - 1)

        def begin(at_first: bool) -> None:
            expert, first, count, part, number = tile.now()  # written by the kernel before the last one
            weights.begin(expert, rows_of(part))
            if isinstance(activations, Images):
                activations.locate(number, count)
            else:
                activations.locate(lambda token: first + token, count)
            if at_first:
                grid_wait()
            activations.begin(weights.blocks)

        def run() -> None:
            expert, _, _, part, _ = tile.now()
            weights.run(expert, rows_of(part), activations, sums)

        def finish() -> None:
            expert, first, count, part, _ = tile.kept()
            base = T.Bind(shape.first_tile(part, group, warp))
            _outputs(spec, sums, staged, y, bias, order, routing_weights, expert, first, count, base, thread)

        total = T.Bind(tiles[tiles.shape[0] - 1, 0] * tile.parts)
        each_tile(tile, total, block // spec.cluster, spec.grid(layout.d, tokens)[0] // spec.cluster, begin, run, finish)
        if shape.cluster:
            cluster_ready()
        grid_wait()
        grid_launch()

    def grid(operands: tuple[Any, ...]) -> list[Expr]:
        return spec.grid(layout.d, operands[-1])

    words = shape.words + staged_words + barrier_words(shape)
    return kernel("down", THREADS, arguments, grid, body, words=words, blocks_per_multiprocessor=shape.residency, cluster=spec.cluster)


def _outputs(
    spec: PrefillSpec, sums: Buffer, memory: Buffer, y: Buffer, bias: Buffer | None, order: Buffer, routing_weights: Buffer, expert: Expr,
    first: Expr, count: Expr, base: Expr, thread: Expr,
) -> None:  # fmt: skip
    """Multiply by the routing weights and write, by way of shared memory, 16 bytes at a time."""
    layout, shape, wide = spec.layout, spec.shape, spec.dtype == "float32"
    warp, lane, group = thread // 32 % 4, thread % 32, thread // 128
    words = 64 if wide else 32  # of a token in a warpgroup's 64 rows
    width = words + 4
    staged = T.Bind(group * shape.tokens * width)
    own = T.Bind(staged + lane % 4 * 2 * width + warp * 16 + lane // 4)
    factors = local(shape.tokens // 4, "float32")
    for n in range(shape.tokens // 8):
        for c in range(2):
            token = T.Bind(n * 8 + lane % 4 * 2 + c)
            store(factors, const(0.0, "float32"), 2 * n + c)
            with when(token < count):
                slot = T.Bind(order[first + token])
                store(factors, routing_weights[slot // spec.top_k, slot % spec.top_k], 2 * n + c)
    for m in range(shape.tiles):

        def outputs(n: int, c: int, m: int = m) -> list[Expr]:
            found = []
            for half in range(2):
                value = sums[m * shape.sums + 4 * n + 2 * half + c]
                if bias is not None:
                    value = value + bias[expert, T.min((base + 4 * m) * ROWS + half * 8 + lane // 4, layout.d - 1)]
                found.append(T.Bind(value * factors[2 * n + c]))
            return found

        if wide:
            for n in range(shape.tokens // 8):
                for c in range(2):
                    for half, value in enumerate(outputs(n, c)):
                        store(memory, T.reinterpret("uint32", value), own + ((n * 8 + c) * width + half * 8))
        else:
            _store(shape.tokens // 8, 2, outputs, memory, staged + warp * (ROWS // 2), width, lane)
        sync()
        pieces, elements = words // 4, 4 if wide else 8
        row0 = T.Bind((base - warp + 4 * m) * ROWS)
        with strided(thread % 128, shape.tokens * pieces, 128) as i:
            token, piece = i // pieces, i % pieces
            row = row0 + piece * elements
            with when(T.And(token < count, row < layout.d)):
                read_words(at(y, first + token, row), at(memory, staged + token * width + piece * 4))
        sync()
