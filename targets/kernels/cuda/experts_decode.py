"""The experts of a few tokens: two kernels that read each expert's weights once, limited by the bandwidth of memory.

    gate_up   a block computes some tiles of one expert's hidden values for all tokens that are routed to it
    down      a block computes 16 outputs of all tokens: its warps share out the weights of all experts of the tokens as one stream, and
              add what the experts give, times the routing weights, so that nothing is written in between and the order is fixed

The columns of a product are tokens. Activations of float32 are split in two terms of bfloat16, a column each.
Hidden values are kept as pairs in the order in which a lane of `down` reads them: pair 8 s + 4 h + t of 32 values is at 4 t + 2 s + h.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script import builder as T

from moec.targets.kernels.cpu.activation_functions import ExpertActivation
from moec.targets.kernels.cuda.activation import gated, plain
from moec.targets.kernels.cuda.counting import EXPERTS, TOKENS, count, counts_argument
from moec.targets.kernels.cuda.emit import Buffer, Expr, Shared, argument, at, const, kernel, local, store, strided, sync, when
from moec.targets.kernels.cuda.experts_layout import ExpertsLayout
from moec.targets.kernels.cuda.intrinsics import grid_launch, grid_wait, term
from moec.targets.kernels.cuda.layout import BLOCK, PADDING, ROWS, ceil_div
from moec.targets.kernels.cuda.ring import Ring
from moec.targets.kernels.cuda.routing import NONE, Routing
from moec.targets.kernels.cuda.share import RaggedShare, Share
from moec.targets.kernels.cuda.stream import Columns, Weights, in_order, stage, staged_columns
from moec.targets.kernels.cuda.warp import warp_down


@dataclass(frozen=True)
class DecodeSpec:
    """The kernels for some tokens of a layer.

    Args:
        tokens: T, at most 8.
        dtype: of x and of the result, `float32` or `bfloat16`.
        terms: of bfloat16 in which float32 activations are split, 1 or 2.
        warps, splits: of a block of gate_up, and how many of them share a tile.
        down_warps: of a block of down.
        unroll: bytes of weights that a lane has under way.
    """

    layout: ExpertsLayout
    activation: ExpertActivation
    tokens: int
    top_k: int
    ids_dtype: str = "int64"
    biases: bool = False
    dtype: str = "float32"
    terms: int = 2
    warps: int = 8
    splits: int = 4
    down_warps: int = 16
    unroll: int = 128
    down_unroll: int = 64
    residency: int = 2
    """Blocks of gate_up that are to fit on a multiprocessor."""
    counted: bool = False
    """Whether gate_up counts the tokens and the experts that run for them."""

    @property
    def columns(self) -> int:
        """Columns in use."""
        return self.tokens * self.terms

    @property
    def fragments(self) -> int:
        """Fragments of 8 columns."""
        return ceil_div(self.columns, 8)

    @property
    def slots(self) -> int:
        """Pairs of a token and one of its experts: the most experts that run."""
        return self.tokens * self.top_k

    @property
    def hidden_shape(self) -> tuple[int, int, int]:
        """bfloat16 pairs [slots, terms, F / 2] between the kernels."""
        return self.slots, self.terms, self.layout.padded_f // 2


def gate_up_func(spec: DecodeSpec) -> tirx.PrimFunc:
    """PrimFunc (x [T, D], ids [T, k], arrays..., [bias], [counts int64 [8]], hidden uint32 [slots, terms, F / 2])."""
    layout, stack = spec.layout, spec.layout.gate_up
    tiles_here, fragments = spec.warps // spec.splits, spec.fragments
    threads, blocks = spec.warps * 32, stack.classes[0].blocks
    stride = blocks * BLOCK // 2 + PADDING
    words = spec.columns * stride + threads * 4 * fragments + Routing.words(spec.tokens, spec.top_k, layout.experts)

    def arguments() -> tuple[Buffer, Buffer, Weights, Buffer | None, Buffer | None, Buffer]:
        x = argument("x", (spec.tokens, layout.d), spec.dtype)
        ids = argument("ids", (spec.tokens, spec.top_k), spec.ids_dtype)
        weights = Weights(stack, "gate_up_", spec.unroll)
        bias = argument("gate_up_bias", (layout.experts, stack.n), "float32") if spec.biases else None
        counts = counts_argument(spec.counted)
        return x, ids, weights, bias, counts, argument("hidden", spec.hidden_shape, "uint32")

    def body(
        operands: tuple[Buffer, Buffer, Weights, Buffer | None, Buffer | None, Buffer], memory: Shared, part: Expr, rank: Expr, thread: Expr
    ) -> None:
        x, ids, weights, bias, counts, hidden = operands
        warp, lane = T.Bind(thread // 32), T.Bind(thread % 32)
        staged = memory.take((spec.columns * stride,), "uint32")
        partial = memory.take((spec.warps, 4 * fragments, 32), "float32")
        grid_wait()
        grid_launch()
        routing = Routing(ids, layout.experts, memory, thread, threads)
        if counts is not None:
            with when(T.And(T.And(part == 0, rank == 0), thread == 0)):
                count(counts, TOKENS, const(spec.tokens, "int32"))
        with when(rank < routing.count):
            expert = T.Bind(routing.expert(rank))
            with when(expert >= 0), weights.tiles(expert, part * tiles_here) as f_tiles:
                tile = T.Bind(part * tiles_here + warp // spec.splits)
                share = T.Bind(warp % spec.splits)
                columns = Columns(fragments)

                def arrive() -> None:
                    """The activations of the tokens that run the expert, in shared memory."""
                    for token in range(spec.tokens):
                        with when(routing.slot_of(rank, token) >= 0):
                            stage(staged, stride, token * spec.terms, spec.terms, x, token, thread, threads)
                    sync()

                load = staged_columns(staged, stride, spec.columns, fragments, lane)
                start, stop = T.Bind(share * blocks // spec.splits), T.Bind((share + 1) * blocks // spec.splits)
                weights.stream(expert, T.min(tile, f_tiles - 1), start, stop, lane, load, columns, arrive)
                for i in range(4 * fragments):
                    store(partial, columns.sums[i], warp, i, lane)
                if counts is not None:
                    with when(T.And(part == 0, thread == 0)):
                        count(counts, EXPERTS, sum(T.cast(routing.slot_of(rank, token) >= 0, "int32") for token in range(spec.tokens)))
                sync()
                with when(T.And(share == 0, tile < f_tiles)):
                    _finish(spec, partial, bias, hidden, routing, rank, expert, warp, lane, tile, f_tiles)

    def grid(_: object) -> list[Expr]:
        return [ceil_div(layout.f_tiles, tiles_here), spec.slots]

    return kernel("gate_up", threads, arguments, grid, body, words=words, blocks_per_multiprocessor=spec.residency)


def _finish(
    spec: DecodeSpec, partial: Buffer, bias: Buffer | None, hidden: Buffer, routing: Routing, rank: Expr, expert: Expr, warp: Expr,
    lane: Expr, tile: Expr, f_tiles: Expr,
) -> None:  # fmt: skip
    """Add up what the warps of a tile have, apply the activation function, and write hidden values."""
    layout = spec.layout
    sums = local(4 * spec.fragments, "float32")
    for i in range(4 * spec.fragments):
        store(sums, partial[warp, i, lane], i)
        for other in range(1, spec.splits):
            store(sums, sums[i] + partial[warp + other, i, lane], i)
    row = T.Bind(lane // 4)
    for n in range(spec.fragments):
        for c in range(0, 2, spec.terms):
            token = (n * 8 + lane % 4 * 2 + c) // spec.terms
            slot = local(1, "int32")
            store(slot, const(NONE, "int32"), 0)
            with when(token < spec.tokens):
                store(slot, routing.slot_of(rank, token), 0)
            values = []
            for half in range(2):
                value = sums[4 * n + 2 * half + c]
                if spec.terms == 2:
                    value = value + sums[4 * n + 2 * half + 1]
                if bias is not None:
                    value = value + bias[expert, tile * ROWS + half * 8 + row]
                values.append(T.Bind(value))
            if layout.gated:
                _keep(spec, hidden, slot[0], tile * 8 + row, gated(spec.activation, values[0], values[1]))
            else:
                for half, value in enumerate(values):
                    _keep(spec, hidden, slot[0], tile * ROWS + half * 8 + row, plain(spec.activation, value))
            with when(T.And(T.And(tile == f_tiles - 1, row == 0), slot[0] >= 0)):
                _clear_rest(spec, hidden, slot[0], f_tiles)


def _clear_rest(spec: DecodeSpec, hidden: Buffer, slot: Expr, f_tiles: Expr) -> None:
    """What is left of the last block is zero."""
    pairs = f_tiles * spec.layout.tile_rows // 2
    with T.serial((pairs + BLOCK // 2 - 1) // (BLOCK // 2) * (BLOCK // 2) - pairs) as i:
        rest = T.Bind(pairs + i)
        for index in range(spec.terms):
            store(hidden, const(0, "uint32"), slot, index, _place(rest))


def _place(pair: Expr) -> Expr:
    """Where a pair of hidden values is kept."""
    return in_order(pair, pair % 16)


def _keep(spec: DecodeSpec, hidden: Buffer, slot: Expr, f: Expr, value: Expr) -> None:
    """Write a hidden value of a slot, if there is one: neighbours are in lanes 4 apart, of which the even one writes both."""
    value = T.Bind(value)
    other = T.Bind(warp_down(value, 4))
    with when(T.And(f % 2 == 0, slot >= 0)):
        pair = T.Bind(f // 2)
        for index in range(spec.terms):
            store(hidden, term(value, other, index), slot, index, _place(pair))


def down_func(spec: DecodeSpec) -> tirx.PrimFunc:
    """PrimFunc (hidden, ids [T, k], routing weights f32 [T, k], arrays..., [bias], out [T, D])."""
    layout, stack = spec.layout, spec.layout.down
    fragments, warps = spec.fragments, spec.down_warps
    threads, blocks = warps * 32, stack.classes[0].blocks
    words = threads * 4 * fragments + Routing.words(spec.tokens, spec.top_k, layout.experts) + Ring.words(spec.columns, warps)
    ragged = bool(stack.columns) or stack.mixed
    words += RaggedShare.words(spec.slots) if ragged else 0

    def arguments() -> tuple[Buffer, Buffer, Buffer, Weights, Buffer | None, Buffer]:
        hidden = argument("hidden", spec.hidden_shape, "uint32")
        ids = argument("ids", (spec.tokens, spec.top_k), spec.ids_dtype)
        routing_weights = argument("weights", (spec.tokens, spec.top_k), "float32")
        weights = Weights(stack, "down_", spec.down_unroll)
        bias = argument("down_bias", (layout.experts, layout.d), "float32") if spec.biases else None
        return hidden, ids, routing_weights, weights, bias, argument("out", (spec.tokens, layout.d), spec.dtype)

    def body(operands: tuple[Buffer, Buffer, Buffer, Weights, Buffer | None, Buffer], memory: Shared, tile: Expr, thread: Expr) -> None:
        hidden, ids, routing_weights, weights, bias, out = operands
        grid_launch()
        warp, lane = T.Bind(thread // 32), T.Bind(thread % 32)
        partial = memory.take((warps, 4 * fragments, 32), "float32")
        # gate_up has waited for what wrote the ids, before it let this kernel begin.
        routing = Routing(ids, layout.experts, memory, thread, threads)
        ring = Ring(lambda row, word: at(hidden, row // spec.terms, row % spec.terms, word), spec.columns, memory, warp, warps, lane)
        factors = local(2 * fragments, "float32")
        columns = Columns(fragments, factors)
        share = RaggedShare(routing, weights, memory, spec.slots, thread, threads) if ragged else Share(routing, blocks)

        def row_of(rank: Expr, column: Expr) -> Expr:
            slot = T.Bind(routing.slot_of(rank, column // spec.terms))
            return T.Select(slot >= 0, slot * spec.terms + column % spec.terms, const(NONE, "int32"))

        total = T.Bind(share.total)
        begin, end = T.Bind(warp * total // warps), T.Bind((warp + 1) * total // warps)
        with share.each(begin, end) as rank:
            expert = T.Bind(routing.expert(rank))
            with when(expert >= 0):
                start, stop = share.part(rank, expert, begin, end)
                for n in range(fragments):
                    for c in range(2):
                        token = (n * 8 + lane % 4 * 2 + c) // spec.terms
                        store(factors, const(0.0, "float32"), 2 * n + c)
                        with when(token < spec.tokens):
                            slot = T.Bind(routing.slot_of(rank, token))
                            with when(slot >= 0):
                                store(factors, routing_weights[slot // spec.top_k, slot % spec.top_k], 2 * n + c)
                ring.locate(lambda column: row_of(rank, column))
                weights.stream(expert, tile, start, stop, lane, ring, columns, grid_wait)
        for i in range(4 * fragments):
            store(partial, columns.sums[i], warp, i, lane)
        grid_wait()
        sync()
        with strided(thread, 128 * fragments, threads) as i:
            _write(spec, partial, routing_weights, bias, out, routing, tile, i)

    return kernel("down", threads, arguments, lambda _: [stack.classes[0].tiles], body, words=words)


def _write(
    spec: DecodeSpec, partial: Buffer, routing_weights: Buffer, bias: Buffer | None, out: Buffer, routing: Routing, tile: Expr, i: Expr
) -> None:
    """Add up one output of one token over the warps, and write it."""
    which, lane = T.Bind(i // 32), T.Bind(i % 32)
    n, c = which // 4, which % 4
    column, row = T.Bind(n * 8 + lane % 4 * 2 + c % 2), T.Bind(tile * ROWS + lane // 4 + c // 2 * 8)
    token = T.Bind(column // spec.terms)
    with when(T.And(T.And(column % spec.terms == 0, token < spec.tokens), row < spec.layout.d)):
        total = local(1, "float32")
        store(total, const(0.0, "float32"), 0)
        for warp in range(spec.down_warps):
            for index in range(spec.terms):
                store(total, total[0] + partial[warp, which + index, lane], 0)
        if bias is not None:
            with T.serial(T.Bind(routing.count)) as rank:
                slot = T.Bind(routing.slot_of(rank, token))
                expert = T.Bind(routing.expert(rank))
                with when(T.And(slot >= 0, expert >= 0)):
                    weight = routing_weights[slot // spec.top_k, slot % spec.top_k]
                    store(total, total[0] + weight * bias[expert, row], 0)
        store(out, T.cast(total[0], spec.dtype), token, row)
