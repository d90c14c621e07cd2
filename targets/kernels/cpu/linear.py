"""linear: x float32 [T, K] times a packed weight [N, K], plus a bias [N]."""

from __future__ import annotations

from collections.abc import Mapping

from tvm import relax, tirx
from tvm.tirx.script import builder as T

from moec.targets.kernels.cpu.activations import Activations
from moec.targets.kernels.cpu.emit import Expr, argument, prim_func, store_rows, tensor_shape, tensor_type
from moec.targets.kernels.cpu.isa import Isa
from moec.targets.kernels.cpu.layout import LANES, LaneLayout, ceil_div
from moec.targets.kernels.cpu.loops import over_tiles
from moec.targets.kernels.cpu.register_tile import RegisterTile, token_tiles, weight_arguments


def linear_func(layout: LaneLayout, tokens: int | None, bias: bool, isa: Isa) -> tirx.PrimFunc:
    """PrimFunc (x [T, K], weight arrays..., [bias [N]], out [T, N]); `tokens` is T where it is static."""

    def build() -> None:
        t = tokens if tokens is not None else T.int64()
        x = argument("x", (t, layout.k), "float32")
        weights = weight_arguments(layout)
        offset = argument("bias", (layout.n,), "float32") if bias else None
        out = argument("out", (t, layout.n), "float32")
        activations = Activations(layout, isa, t)
        activations.fill(x)
        kernel = RegisterTile(layout, isa, weights, activations)
        with over_tiles(tokens, layout.nbytes(), ceil_div(layout.tiles, isa.row_tiles)) as task:
            tiles = [T.Bind(T.min(task * isa.row_tiles + r, layout.tiles - 1)) for r in range(isa.row_tiles)]

            def tile(first: Expr, size: int) -> None:
                def write(which: int, lane: int, token: int, value: Expr) -> None:
                    row = tiles[which] * LANES + lane
                    store_rows(out, value, first + token, row, rows=layout.n, lanes=isa.lanes, add=offset)

                kernel.emit([(index,) for index in tiles], [first + i for i in range(size)], write)

            token_tiles(t, isa.tokens, tile)

    return prim_func(build)


def linear(
    bb: relax.BlockBuilder,
    x: relax.Expr,
    weights: Mapping[str, relax.Expr],
    layout: LaneLayout,
    isa: Isa,
    bias: relax.Expr | None = None,
) -> relax.Var:
    """Emit x float32 [T, K] @ W^T + bias -> float32 [T, N]; T is static or symbolic.

    Args:
        weights: the arrays of `layout.arrays()` by name.
        bias: float32 [N].
    """
    t = tensor_shape(x)[0]
    static = int(t) if isinstance(t, tirx.IntImm) else None
    func = bb.add_func(linear_func(layout, static, bias is not None, isa), "linear")
    arguments = [x, *(weights[name] for name in layout.arrays()), *([] if bias is None else [bias])]
    return bb.emit(relax.call_tir(func, arguments, out_ty=tensor_type((t, layout.n), "float32")))
