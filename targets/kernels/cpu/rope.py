"""rope of `moec.compiler.ops`: x [T, H*d] turned by the angles of each token, cos and sin [T, d]."""

from __future__ import annotations

from tvm import tirx
from tvm.tirx.script import builder as T

from moec.targets.kernels.cpu.emit import Expr, argument, prim_func, store, vector
from moec.targets.kernels.cpu.isa import Isa
from moec.targets.kernels.cpu.loops import over_row, over_tokens


def rope_func(heads: int, d: int, tokens: int | None, isa: Isa) -> tirx.PrimFunc:
    """PrimFunc (x [T, H*d], cos [T, d], sin [T, d], out [T, H*d]), all float32."""

    def build() -> None:
        count = tokens if tokens is not None else T.int64()
        x = argument("x", (count, heads * d), "float32")
        cos = argument("cos", (count, d), "float32")
        sin = argument("sin", (count, d), "float32")
        out = argument("out", (count, heads * d), "float32")

        def row(token: Expr) -> None:
            with T.serial(heads) as head:

                def pair(i: Expr, w: int) -> None:
                    low, high = (T.Bind(vector(x, token, head * d + i + o, lanes=w)) for o in (0, d // 2))
                    for o, value, other in ((0, low, T.float32(0) - high if w == 1 else -high), (d // 2, high, low)):
                        turned = value * vector(cos, token, i + o, lanes=w) + other * vector(sin, token, i + o, lanes=w)
                        store(out, turned, token, head * d + i + o, lanes=w)

                over_row(d // 2, isa.lanes, pair)

        over_tokens(count, heads * d, row)

    return prim_func(build)
