"""best: the likeliest token of each row of logits, and what its probability takes, so that the host gets three numbers of a row, not all.

A block of threads has a row. Maximum and sum of exponentials are computed online (https://arxiv.org/abs/1805.02867): a row is read once.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from moec.targets.kernels.cuda.emit import WARP, Expr, Shared, argument, kernel, local, store, sync, when
from moec.targets.kernels.cuda.intrinsics import grid_launch, grid_wait
from moec.targets.kernels.cuda.layout import ceil_div
from moec.targets.kernels.cuda.warp import warp_argmax, warp_max, warp_sum

THREADS = 1024
AT_ONCE = 8  # numbers that a thread asks for before it looks at the first
LOWEST = -3.4028234e38


def best_func(size: int, rows: int | None) -> tirx.PrimFunc:
    """PrimFunc (logits f32 [R, size], out f32 [R, 3]): index of the largest (the lowest of several), the largest, log(sum(exp)).

    With a NaN or an infinity among the logits the last two are not both finite (-inf alone is a token that cannot come).
    """

    def arguments() -> Any:
        count = rows if rows is not None else T.int64()
        return argument("logits", (count, size), "float32"), argument("out", (count, 3), "float32"), count

    def body(operands: Any, memory: Shared, row: Expr, thread: Expr) -> None:
        logits, out, _ = operands
        grid_launch()
        largest, total, index = local(1, "float32"), local(1, "float32"), local(1, "int32")
        store(largest, T.float32(LOWEST), 0)
        store(total, T.float32(0), 0)
        store(index, T.int32(0), 0)
        values = local(AT_ONCE, "float32")
        grid_wait()
        with T.serial(ceil_div(size, THREADS * AT_ONCE)) as turn:
            first = T.Bind(turn * (THREADS * AT_ONCE) + thread)
            for i in range(AT_ONCE):
                store(values, T.float32(LOWEST), i)
                with when(first + i * THREADS < size):
                    store(values, logits[row, first + i * THREADS], i)
            before = T.Bind(largest[0])
            for i in range(AT_ONCE):
                store(index, T.Select(values[i] > largest[0], first + i * THREADS, index[0]), 0)
                store(largest, T.Select(values[i] > largest[0], values[i], largest[0]), 0)
            store(total, total[0] * T.exp(before - largest[0]), 0)
            for i in range(AT_ONCE):
                own = T.exp(values[i] - largest[0])
                store(total, total[0] + T.Select(first + i * THREADS < size, own, T.float32(0)), 0)
        warps = THREADS // WARP
        parts = [memory.take((warps,), dtype) for dtype in ("float32", "float32", "int32")]
        found = _together(largest[0], total[0], index[0])
        with when(thread % WARP == 0):
            for part, value in zip(parts, found, strict=True):
                store(part, value, thread // WARP)
        sync()
        with when(thread < WARP):
            most, whole, where = _together(*(part[thread] for part in parts))
            with when(thread == 0):
                store(out, T.cast(where, "float32"), row, 0)
                store(out, most, row, 1)
                store(out, most + T.log(whole), row, 2)

    return kernel("best", THREADS, arguments, lambda o: [o[2]], body, words=3 * WARP)


def _together(largest: Expr, total: Expr, index: Expr) -> tuple[Expr, Expr, Expr]:
    """What the lanes of a warp have found, as one."""
    largest = T.Bind(largest)
    most = warp_max(largest)
    return most, warp_sum(total * T.exp(largest - most)), warp_argmax(largest, index)
