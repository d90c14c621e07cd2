"""linear: a packed matrix times activations, x float32 [T, K] -> float32 [T, N].

A few tokens read the weights as a stream (`stream`); more go through the tensor cores' large products (`product`). Activations count as
two terms of bfloat16, 16 bits of them, or of many tokens as one, if so asked, and integer weights are not rounded. One to eight tokens have
`projections` instead, and up to some hundred `linear_tokens`, where those suit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from tvm import relax, tirx
from tvm.tirx.script import builder as T

from moec.targets.kernels.cpu.emit import tensor_shape
from moec.targets.kernels.cuda import product, stream
from moec.targets.kernels.cuda.calls import Functions, Gpu
from moec.targets.kernels.cuda.emit import Buffer, Expr, Shared, argument, at, const, kernel, local, store, strided, sync, when
from moec.targets.kernels.cuda.experts_layout import Stack
from moec.targets.kernels.cuda.gathered import Activations, first_tile, row_tiles
from moec.targets.kernels.cuda.intrinsics import grid_launch, grid_wait, store_word, term
from moec.targets.kernels.cuda.layout import BLOCK, PADDING, ROWS, FragmentLayout, ceil_div
from moec.targets.kernels.cuda.shape import Shape
from moec.targets.kernels.cuda.space import MOST_DECODE

TERMS = 2


def split_name(terms: int) -> str:
    """The name under which the terms of a value are kept."""
    return f"split{terms}"


LANE_BYTES = 64
"""Of weights that a lane of the kernel of a few tokens has under way."""


@dataclass(frozen=True)
class LinearSpec:
    """The kernels of a linear layer.

    Args:
        tokens: of a block of the kernel of a few tokens, at most `MOST_DECODE`.
        warps, splits: of such a block, and how many of them share a tile of 16 rows.
        shape: the size of a block's product for more tokens.
    """

    layout: FragmentLayout
    bias: bool = False
    tokens: int = 1
    warps: int = 8
    splits: int = 4
    shape: Shape = field(default_factory=lambda: Shape(64, 1, 4, TERMS))

    @property
    def stack(self) -> Stack:
        """The matrix as a stack of one."""
        return Stack(1, self.layout.n, self.layout.k, (self.layout.format,))

    @property
    def stride(self) -> int:
        """Words of a row of activations in shared memory."""
        return self.layout.blocks * BLOCK // 2 + PADDING

    @property
    def fragments(self) -> int:
        """Fragments of 8 columns: tokens have as many as terms."""
        return ceil_div(self.tokens * TERMS, 8)

    @property
    def words(self) -> int:
        """Words of shared memory of a block of the kernel of a few tokens."""
        return self.tokens * TERMS * self.stride + self.warps * 32 * 4 * self.fragments


def decode_func(spec: LinearSpec) -> tirx.PrimFunc:
    """PrimFunc (x f32 [T, K], arrays..., [bias], out f32 [T, N]) of T = `spec.tokens`."""
    layout, here, fragments = spec.layout, spec.warps // spec.splits, spec.fragments
    threads, columns_used = spec.warps * 32, spec.tokens * TERMS

    def arguments() -> tuple[Buffer, stream.Weights, Buffer | None, Buffer]:
        x = argument("x", (spec.tokens, layout.k), "float32")
        weights = stream.Weights(spec.stack, "", LANE_BYTES)
        bias = argument("bias", (layout.n,), "float32") if spec.bias else None
        return x, weights, bias, argument("out", (spec.tokens, layout.n), "float32")

    def body(operands: tuple[Buffer, stream.Weights, Buffer | None, Buffer], memory: Shared, part: Expr, thread: Expr) -> None:
        x, weights, bias, out = operands
        warp, lane = T.Bind(thread // 32), T.Bind(thread % 32)
        staged = memory.take((columns_used * spec.stride,), "uint32")
        partial = memory.take((spec.warps, 4 * fragments, 32), "float32")
        tile, share = T.Bind(part * here + warp // spec.splits), T.Bind(warp % spec.splits)
        columns = stream.Columns(fragments)

        def arrive() -> None:
            """The activations as terms in shared memory, once the kernel before this one has written them."""
            grid_wait()
            grid_launch()
            for token in range(spec.tokens):
                stream.stage(staged, spec.stride, token * TERMS, TERMS, x, token, thread, threads)
            sync()

        load = stream.staged_columns(staged, spec.stride, columns_used, fragments, lane)
        start, stop = T.Bind(share * layout.blocks // spec.splits), T.Bind((share + 1) * layout.blocks // spec.splits)
        weights.stream(const(0, "int32"), T.min(tile, layout.tiles - 1), start, stop, lane, load, columns, arrive)
        for i in range(4 * fragments):
            store(partial, columns.sums[i], warp, i, lane)
        sync()
        with when(T.And(share == 0, tile < layout.tiles)):
            for n in range(fragments):
                token = T.Bind(n * 4 + lane % 4)
                with when(token < spec.tokens):
                    _outputs(spec, partial, bias, out, warp, lane, n, tile, token)

    return kernel("linear", threads, arguments, lambda _: [ceil_div(layout.tiles, here)], body, words=spec.words)


def _outputs(
    spec: LinearSpec, partial: Buffer, bias: Buffer | None, out: Buffer, warp: Expr, lane: Expr, n: int, tile: Expr, token: Expr
) -> None:
    """Add up what the warps of a tile have of a lane's token in fragment n, and write its two rows."""
    for half in range(2):
        total = local(1, "float32")
        store(total, const(0.0, "float32"), 0)
        for other in range(spec.splits):
            for index in range(TERMS):
                store(total, total[0] + partial[warp + other, 4 * n + 2 * half + index, lane], 0)
        row = T.Bind(tile * ROWS + half * 8 + lane // 4)
        with when(row < spec.layout.n):
            store(out, total[0] if bias is None else total[0] + bias[row], token, row)


def split_func(k: int, terms: int = TERMS) -> tirx.PrimFunc:
    """PrimFunc (x f32 [T, K], out uint16 [terms, T, K]): float32 as terms of bfloat16."""
    threads = 256

    def arguments() -> tuple[Buffer, Buffer, Expr]:
        tokens = T.int64()
        return argument("x", (tokens, k), "float32"), argument("out", (terms, tokens, k), "uint16"), tokens

    def body(operands: tuple[Buffer, Buffer, Expr], memory: Shared, token: Expr, thread: Expr) -> None:
        x, out, _ = operands
        del memory
        grid_wait()
        grid_launch()
        with strided(thread, k // 2, threads) as pair:
            for index in range(terms):
                store_word(at(out, index, token, 2 * pair), term(x[token, 2 * pair], x[token, 2 * pair + 1], index))

    return kernel("split", threads, arguments, lambda operands: [operands[-1]], body)


def terms_of(functions: Functions, x: relax.Expr, terms: int) -> relax.Expr:
    """Emit x [T, K] as terms of bfloat16: uint16 [terms, T, K]. All that read them have the same."""
    t, k = tensor_shape(x)
    out = (terms, t, k), "uint16"
    key = int(k), terms
    return functions.once(split_name(terms), x, lambda: functions.call("split", key, lambda: split_func(*key), [x], out)[0])


def prefill_func(spec: LinearSpec) -> tirx.PrimFunc:
    """PrimFunc (x uint16 [terms, T, K], arrays..., [bias], out f32 [T, N])."""
    layout, shape = spec.layout, spec.shape

    def arguments() -> tuple[Buffer, product.Weights, Buffer | None, Buffer, Expr]:
        tokens = T.int64()
        x = argument("x", (shape.terms, tokens, layout.k), "uint16")
        weights = product.Weights(spec.stack, "")
        bias = argument("bias", (layout.n,), "float32") if spec.bias else None
        return x, weights, bias, argument("out", (tokens, layout.n), "float32"), tokens

    def body(
        operands: tuple[Buffer, product.Weights, Buffer | None, Buffer, Expr], memory: Shared, part: Expr, tile: Expr, thread: Expr
    ) -> None:
        x, weights, bias, out, tokens = operands
        ring = memory.take((shape.words,), "uint32")
        first = T.Bind(tile * shape.tokens)
        count = T.Bind(T.min(T.cast(tokens, "int32") - first, shape.tokens))
        warp, lane, group = T.Bind(thread // 32 % 4), T.Bind(thread % 32), T.Bind(thread // 128)
        base = T.Bind(first_tile(shape, part, group, warp))
        tiles = row_tiles(shape, base, layout.tiles - 1)
        activations, sums = Activations(shape, ring, x, layout.k, thread), local(shape.tiles * shape.sums, "float32")
        weights.prepare(shape, thread)
        weights.begin(const(0, "int32"), tiles)
        activations.locate(lambda token: first + token, count)
        grid_wait()
        grid_launch()
        activations.begin(weights.blocks)
        weights.run(const(0, "int32"), tiles, activations, sums, count)
        for m in range(shape.tiles):
            for half in range(2):
                row = T.Bind((base + 4 * m) * ROWS + half * 8 + lane // 4)
                with when(row < layout.n):
                    for n in range(shape.tokens // 8):
                        for c in range(2):
                            token = T.Bind(n * 8 + lane % 4 * 2 + c)
                            with when(token < count):
                                value = sums[m * shape.sums + 4 * n + 2 * half + c]
                                store(out, value if bias is None else value + bias[row], first + token, row)

    def grid(operands: tuple[Buffer, product.Weights, Buffer | None, Buffer, Expr]) -> list[Expr]:
        return [ceil_div(layout.tiles, shape.block_tiles), T.cast((operands[-1] + shape.tokens - 1) // shape.tokens, "int32")]

    return kernel("linear", shape.threads, arguments, grid, body, words=shape.words, blocks_per_multiprocessor=shape.residency)


def few_tokens(layout: FragmentLayout, bias: bool, tokens: int | None, gpu: Gpu) -> LinearSpec | None:
    """The kernel of a few tokens, if that is to run; None for the large products.

    Args:
        tokens: T, None for any number.
    """
    if tokens is None or tokens > MOST_DECODE:
        return None
    found = LinearSpec(layout, bias, tokens)
    if found.tokens == 1:
        return found
    # Each block stages all of its activations: it should have as many rows as leave no multiprocessor idle.
    splits = next((n for n in (1, 2) if ceil_div(layout.tiles * n, found.warps) >= 2 * gpu.multiprocessors), found.splits)
    return replace(found, splits=splits) if 4 * found.words <= gpu.shared_bytes else None


def linear(
    functions: Functions, x: relax.Expr, weights: Mapping[str, relax.Expr], layout: FragmentLayout, bias: relax.Expr | None,
    most: int | None, gpu: Gpu, terms: int = TERMS,
) -> relax.Expr:  # fmt: skip
    """Emit x @ W^T (+ bias): float32 [T, N].

    Args:
        x: float32 [T, K].
        weights: the arrays of `layout.arrays()` by name, each with a leading axis of 1.
        bias: float32 [N].
        most: the most tokens, where T is a variable; None for any number.
        terms: of bfloat16 that an activation counts as, where tokens are many.
    """
    t, _ = tensor_shape(x)
    arrays = [weights[name] for name in layout.arrays()]
    rest, out = [] if bias is None else [bias], ((t, layout.n), "float32")
    few = few_tokens(layout, bias is not None, int(t) if isinstance(t, tirx.IntImm) else None, gpu)
    if few is not None:
        return functions.call("linear", ("few", few), lambda: decode_func(few), [x, *arrays, *rest], out)[0]
    sizes = (min(size, ceil_div(most or size, 8) * 8) for size in (64, 32, 16))
    shapes = (Shape(size, 1, stages, terms) for size in sizes for stages in (4, 3))
    spec = LinearSpec(layout, bias is not None, shape=next(shape for shape in shapes if 4 * shape.words <= gpu.shared_bytes))
    return functions.call("linear", ("many", spec), lambda: prefill_func(spec), [terms_of(functions, x, terms), *arrays, *rest], out)[0]
