"""rope of `moec.compiler.ops`: x [T, H*d] turned by the angles of each token, cos and sin [T, d]; a thread turns one pair."""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from moec.targets.kernels.cuda.emit import Expr, Shared, argument, kernel, store, when
from moec.targets.kernels.cuda.intrinsics import grid_launch, grid_wait
from moec.targets.kernels.cuda.layout import ceil_div

THREADS = 128


def rope_func(heads: int, d: int, tokens: int | None) -> tirx.PrimFunc:
    """PrimFunc (x [T, H*d], cos [T, d], sin [T, d], out [T, H*d]), all float32."""
    pairs = heads * (d // 2)

    def arguments() -> Any:
        count = tokens if tokens is not None else T.int64()
        x = argument("x", (count, heads * d), "float32")
        cos = argument("cos", (count, d), "float32")
        sin = argument("sin", (count, d), "float32")
        return count, x, cos, sin, argument("out", (count, heads * d), "float32")

    def body(operands: Any, _: Shared, block: Expr, token: Expr, thread: Expr) -> None:
        x, cos, sin, out = operands[1:]
        grid_launch()
        grid_wait()
        pair = T.Bind(block * THREADS + thread)
        with when(pair < pairs):
            i = T.Bind(pair % (d // 2))
            at = T.Bind(pair // (d // 2) * d + i)
            low, high = T.Bind(x[token, at]), T.Bind(x[token, at + d // 2])
            store(out, low * cos[token, i] - high * sin[token, i], token, at)
            store(out, high * cos[token, i + d // 2] + low * sin[token, i + d // 2], token, at + d // 2)

    return kernel("rope", THREADS, arguments, lambda o: [ceil_div(pairs, THREADS), o[0]], body)
