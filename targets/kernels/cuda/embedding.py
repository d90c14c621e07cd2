"""embedding: rows of a packed weight [V, D], dequantised from the layout that `linear` reads, so that a tied head is stored once."""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from moec.targets.kernels.cuda.element import element, weight_arguments
from moec.targets.kernels.cuda.emit import Expr, Shared, argument, kernel, store, when
from moec.targets.kernels.cuda.intrinsics import grid_launch, grid_wait
from moec.targets.kernels.cuda.layout import FragmentLayout, ceil_div

THREADS = 128


def embedding_func(layout: FragmentLayout, tokens: int | None, ids_dtype: str = "int64") -> tirx.PrimFunc:
    """PrimFunc (ids [T], weight arrays..., out float32 [T, D])."""

    def arguments() -> Any:
        count = tokens if tokens is not None else T.int64()
        ids = argument("ids", (count,), ids_dtype)
        weights = weight_arguments(layout)
        return count, ids, weights, argument("out", (count, layout.k), "float32")

    def body(operands: Any, _: Shared, block: Expr, token: Expr, thread: Expr) -> None:
        ids, weights, out = operands[1:]
        grid_launch()
        grid_wait()
        column = T.Bind(block * THREADS + thread)
        with when(column < layout.k):
            row = T.Bind(T.cast(ids[token], "int32"))
            store(out, element(layout, weights, (), row, column), token, column)

    return kernel("embedding", THREADS, arguments, lambda o: [ceil_div(layout.k, THREADS), o[0]], body)
