"""linear: a packed matrix times activations, x float32 [T, K] -> float32 [T, N].

One token reads the weights as a stream (`stream`); more go through the tensor cores' large products (`product`). Either way activations
count as two terms of bfloat16, 16 bits of them, and integer weights are not rounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tvm import relax, tirx
from tvm.tirx.script import builder as T

from moec.targets.kernels.cpu.emit import tensor_shape, tensor_type
from moec.targets.kernels.cuda import product, stream
from moec.targets.kernels.cuda.emit import Buffer, Expr, Shared, argument, at, const, kernel, local, store, strided, sync, when
from moec.targets.kernels.cuda.experts_layout import Stack
from moec.targets.kernels.cuda.intrinsics import grid_launch, grid_wait, read_words, term
from moec.targets.kernels.cuda.layout import BLOCK, ROWS, FragmentLayout, ceil_div
from moec.targets.kernels.cuda.product import THREADS, Activations, Shape

TERMS = 2


@dataclass(frozen=True)
class LinearSpec:
    """The kernels of a linear layer.

    Args:
        warps, splits: of a block for one token, and how many of them share a tile of 16 rows.
        unroll: bytes of weights that a lane has under way.
        shape: the size of a block's product for more tokens.
    """

    layout: FragmentLayout
    bias: bool = False
    warps: int = 8
    splits: int = 4
    unroll: int = 64
    shape: Shape = field(default_factory=lambda: Shape(64, 1, 4, TERMS))

    @property
    def stack(self) -> Stack:
        """The matrix as a stack of one."""
        return Stack(1, self.layout.n, self.layout.k, (self.layout.format,))


def decode_func(spec: LinearSpec) -> tirx.PrimFunc:
    """PrimFunc (x f32 [1, K], arrays..., [bias], out f32 [1, N])."""
    layout, here = spec.layout, spec.warps // spec.splits
    threads, stride = spec.warps * 32, layout.blocks * BLOCK // 2 + stream.PADDING

    def arguments() -> tuple[Buffer, stream.Weights, Buffer | None, Buffer]:
        x = argument("x", (1, layout.k), "float32")
        weights = stream.Weights(spec.stack, "", spec.unroll)
        bias = argument("bias", (layout.n,), "float32") if spec.bias else None
        return x, weights, bias, argument("out", (1, layout.n), "float32")

    def body(operands: tuple[Buffer, stream.Weights, Buffer | None, Buffer], memory: Shared, part: Expr, thread: Expr) -> None:
        x, weights, bias, out = operands
        warp, lane = T.Bind(thread // 32), T.Bind(thread % 32)
        staged = memory.take((TERMS * stride,), "uint32")
        partial = memory.take((spec.warps, 4, 32), "float32")
        tile, share = T.Bind(part * here + warp // spec.splits), T.Bind(warp % spec.splits)
        columns = stream.Columns(1)

        def arrive() -> None:
            """The activations as terms in shared memory, once the kernel before this one has written them."""
            grid_wait()
            grid_launch()
            stream.stage(staged, stride, 0, TERMS, x, 0, thread, threads)
            sync()

        def load(b: Buffer, block: Expr, j: int) -> None:
            column = T.min(lane // 4, TERMS - 1)  # what the others compute is not used
            read_words(at(b, 0), at(staged, column * stride + block * 64 + j * 16 + lane % 4 * 4))

        start, stop = T.Bind(share * layout.blocks // spec.splits), T.Bind((share + 1) * layout.blocks // spec.splits)
        weights.stream(const(0, "int32"), T.min(tile, layout.tiles - 1), start, stop, lane, load, columns, arrive)
        for i in range(4):
            store(partial, columns.sums[i], warp, i, lane)
        sync()
        with when(T.And(T.And(share == 0, tile < layout.tiles), lane % 4 == 0)):
            for half in range(2):
                total = local(1, "float32")
                store(total, const(0.0, "float32"), 0)
                for other in range(spec.splits):
                    for index in range(TERMS):
                        store(total, total[0] + partial[warp + other, 2 * half + index, lane], 0)
                row = T.Bind(tile * ROWS + half * 8 + lane // 4)
                with when(row < layout.n):
                    store(out, total[0] if bias is None else total[0] + bias[row], 0, row)

    words = TERMS * stride + threads * 4
    return kernel("linear", threads, arguments, lambda _: [ceil_div(layout.tiles, here)], body, words=words)


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
                both = T.Bind(term(x[token, 2 * pair], x[token, 2 * pair + 1], index))
                store(out, T.cast(both % 65536, "uint16"), index, token, 2 * pair)
                store(out, T.cast(both // 65536, "uint16"), index, token, 2 * pair + 1)

    return kernel("split", threads, arguments, lambda operands: [operands[-1]], body)


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
        base = T.Bind(shape.first_tile(part, group, warp))
        tiles = shape.row_tiles(base, layout.tiles - 1)
        activations, sums = Activations(shape, ring, x, layout.k, thread), local(shape.tiles * shape.sums, "float32")
        weights.prepare(shape, lane)
        weights.begin(const(0, "int32"), tiles)
        activations.locate(lambda token: first + token, count)
        grid_wait()
        grid_launch()
        activations.begin(weights.blocks)
        weights.run(const(0, "int32"), tiles, activations, sums)
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
        return [ceil_div(layout.tiles, 8 * shape.tiles), T.cast((operands[-1] + shape.tokens - 1) // shape.tokens, "int32")]

    return kernel("linear", THREADS, arguments, grid, body, words=shape.words, blocks_per_multiprocessor=shape.residency)


def linear(
    bb: relax.BlockBuilder, x: relax.Expr, weights: Mapping[str, relax.Expr], layout: FragmentLayout, bias: relax.Expr | None = None
) -> relax.Var:
    """Emit x @ W^T (+ bias): float32 [T, N]; T is 1 or symbolic.

    Args:
        x: float32 [T, K].
        weights: the arrays of `layout.arrays()` by name, each with a leading axis of 1.
        bias: float32 [N].
    """
    spec = LinearSpec(layout, bias is not None)
    t, _ = tensor_shape(x)
    arrays = [weights[name] for name in layout.arrays()]
    rest = [] if bias is None else [bias]
    if isinstance(t, tirx.IntImm) and int(t) == 1:
        function, source = decode_func(spec), x
    else:
        terms = tensor_type((TERMS, t, layout.k), "uint16")
        source = bb.emit(relax.call_tir(bb.add_func(split_func(layout.k), "split"), [x], out_ty=terms))
        function = prefill_func(spec)
    out = tensor_type((t, layout.n), "float32")
    return bb.emit(relax.call_tir(bb.add_func(function, "linear"), [source, *arrays, *rest], out_ty=out))
