"""What comes out of the products of many tokens: hidden values and outputs, as they leave a block's registers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import TYPE_CHECKING

from tvm.tirx.script import builder as T

from moec.targets.kernels.cuda.activation import gated, plain
from moec.targets.kernels.cuda.copies import shared_address
from moec.targets.kernels.cuda.emit import Buffer, Expr, at, const, local, store, strided, sync, when
from moec.targets.kernels.cuda.image import clear, place
from moec.targets.kernels.cuda.intrinsics import term
from moec.targets.kernels.cuda.layout import BLOCK, ROWS, ceil_div
from moec.targets.kernels.cuda.loads import move, read_words
from moec.targets.kernels.cuda.matrix import store_matrix
from moec.targets.kernels.cuda.narrow import COLUMNS, LANES, NarrowImage, narrow
from moec.targets.kernels.cuda.warp import warp_down

if TYPE_CHECKING:
    from moec.targets.kernels.cuda.experts_prefill import PrefillSpec


def write_hidden(
    spec: PrefillSpec, sums: Buffer, memory: Buffer, hidden: Buffer, bias: Buffer | None, expert: Expr, first: Expr, count: Expr,
    part: Expr, number: Expr, base: Expr, thread: Expr, f_tiles: Expr,
) -> None:  # fmt: skip
    """Apply the activation function and write hidden values, by way of shared memory, 16 bytes at a time."""
    layout, shape = spec.layout, spec.shape
    warp, lane, group = thread // 32 % 4, thread % 32, thread // 128
    per = 4 * layout.tile_rows  # hidden values of a warpgroup for 64 rows
    width = shape.hidden_width(layout.tile_rows)
    staged = T.Bind(group * shape.staged * width)
    own = T.Bind(staged + lane % 4 * 2 * width + (warp * layout.tile_rows + lane // 4) // 2)
    for m in range(shape.tiles):
        tile = T.Bind(base + 4 * m)
        for start, index in product(range(0, shape.tokens, shape.staged), range(shape.terms)):
            size = min(shape.staged, shape.tokens - start)

            def hidden_of(n: int, c: int, m: int = m, tile: Expr = tile, start: int = start) -> list[Expr]:
                return _hidden_values(spec, sums, m, T.min(tile, f_tiles - 1), bias, expert, lane, start // 8 + n, c)

            if shape.terms == 1:
                _store(size // 8, 1 if layout.gated else 2, hidden_of, memory, staged + warp * (layout.tile_rows // 2), width, lane)
            else:
                for n, c in product(range(size // 8), range(2)):
                    for half, out in enumerate(hidden_of(n, c)):
                        other = T.Bind(warp_down(out, 4))
                        with when(lane // 4 % 2 == 0):
                            store(memory, term(out, other, index), own + ((n * 8 + c) * width + half * 4))
            sync()
            pieces = per // 8
            f0 = T.Bind((part * shape.block_tiles + group * 4 * shape.tiles + 4 * m) * layout.tile_rows)
            with strided(thread % 128, size * pieces, 128) as i:
                token, piece = i // pieces, i % pieces
                f = f0 + piece * 8
                if shape.cluster:
                    with when(T.And(token + start < count, f < layout.padded_f)):
                        target = place(hidden, shape.tokens, number, token + start, f)
                        with T.If(f < layout.f):
                            with T.Then():
                                move(target, at(memory, staged + token * width + piece * 4))
                            with T.Else():
                                clear(target)
                else:
                    with when(T.And(token + start < count, f < (f_tiles * layout.tile_rows if layout.widths else layout.f))):
                        move(at(hidden, index, first + (token + start), f), at(memory, staged + token * width + piece * 4))
            sync()


def write_narrow_hidden(
    spec: PrefillSpec, sums: Buffer, memory: Buffer, hidden: NarrowImage, bias: Buffer | None, expert: Expr, first: Expr, count: Expr,
    part: Expr, number: Expr, base: Expr, thread: Expr, f_tiles: Expr,
) -> None:  # fmt: skip
    """Apply the activation function and write hidden values as E4M3, with a scale of each token and 128 of them."""
    layout, shape, width = spec.layout, spec.shape, spec.shape.hidden_width(spec.layout.tile_rows)
    warp, lane, group = thread // 32 % 4, thread % 32, thread // 128
    del first
    for m in range(shape.tiles):
        tile = T.Bind(base + 4 * m)

        def values(n: int, c: int, m: int = m, tile: Expr = tile) -> list[Expr]:
            found = _hidden_values(spec, sums, m, T.min(tile, f_tiles - 1), bias, expert, lane, n, c)
            if layout.f % (shape.block_tiles * layout.tile_rows) == 0:
                return found
            return [
                T.Bind(T.Select(tile * layout.tile_rows + half * 8 + lane // 4 < layout.f, value, const(0.0, "float32")))
                for half, value in enumerate(found)
            ]

        column = (group * (4 * shape.tiles) + 4 * m + warp) * (layout.tile_rows // 2)
        _store(shape.tokens // 8, 1 if layout.gated else 2, values, memory, column, width, lane)
    sync()
    blocks = shape.block_tiles * layout.tile_rows // BLOCK  # of hidden values
    packed, words = local(COLUMNS // 2, "uint32"), local(4, "uint32")
    each = shape.threads // LANES
    for turn in range(ceil_div(shape.tokens * blocks, each)):
        piece = T.Bind(turn * each + thread // LANES)
        token, block, own = T.Bind(piece // blocks), T.Bind(part * blocks + piece % blocks), thread % LANES
        for half in range(2):
            source = T.min(token, shape.tokens - 1) * width + piece % blocks * (BLOCK // 2) + own * (COLUMNS // 2) + 4 * half
            read_words(at(packed, 4 * half), at(memory, source))
        scale = narrow(words, packed)
        with when(T.And(token < count, block * BLOCK < layout.padded_f)):
            hidden.write(number, block, token, own, words, scale)
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
            value = value + bias[expert, tile * ROWS + half * 8 + lane // 4]
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


def write_outputs(
    spec: PrefillSpec, sums: Buffer, memory: Buffer, y: Buffer, bias: Buffer | None, expert: Expr, first: Expr, count: Expr, base: Expr,
    thread: Expr,
) -> None:  # fmt: skip
    """Write outputs, by way of shared memory, 16 bytes at a time."""
    layout, shape, wide = spec.layout, spec.shape, spec.dtype == "float32"
    warp, lane, group = thread // 32 % 4, thread % 32, thread // 128
    width = shape.output_width(spec.dtype)
    staged = T.Bind(group * shape.staged * width)
    own = T.Bind(staged + lane % 4 * 2 * width + warp * 16 + lane // 4)
    for start in range(0, shape.tokens, shape.staged):
        size = min(shape.staged, shape.tokens - start)
        for m in range(shape.tiles):

            def outputs(n: int, c: int, m: int = m, start: int = start) -> list[Expr]:
                found = []
                for half in range(2):
                    value = sums[m * shape.sums + 4 * (start // 8 + n) + 2 * half + c]
                    if bias is not None:
                        value = value + bias[expert, T.min((base + 4 * m) * ROWS + half * 8 + lane // 4, layout.d - 1)]
                    found.append(T.Bind(value))
                return found

            if wide:
                for n, c in product(range(size // 8), range(2)):
                    for half, value in enumerate(outputs(n, c)):
                        store(memory, T.reinterpret("uint32", value), own + ((n * 8 + c) * width + half * 8))
            else:
                _store(size // 8, 2, outputs, memory, staged + warp * (ROWS // 2), width, lane)
            sync()
            elements = 4 if wide else 8
            pieces = 64 // elements
            row0 = T.Bind((base - warp + 4 * m) * ROWS)
            with strided(thread % 128, size * pieces, 128) as i:
                token, piece = i // pieces, i % pieces
                row = row0 + piece * elements
                with when(T.And(token + start < count, row < layout.d)):
                    move(at(y, first + (token + start), row), at(memory, staged + token * width + piece * 4))
            sync()
