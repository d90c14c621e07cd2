"""ahead: after a step, the inputs of the next one, so that steps follow each other without the host.

The token that `best` has found for a sequence is its next input, one position further; what `best` found is kept for the host.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from moec.targets.kernels.cuda.emit import Expr, Shared, argument, kernel, store, strided, sync, when
from moec.targets.kernels.cuda.intrinsics import grid_wait

THREADS = 128


def ahead_func() -> tirx.PrimFunc:
    """PrimFunc (found f32 [R, 3], ids i64 [T], positions i64 [T], blocks i32 [T, 4], turn i32 [2], history f32 [N, R, 3]): all but the
    first change.

    Args (of the PrimFunc):
        found: of `best`. The first turn[1] rows, at least one, are those of the tokens; tokens behind them repeat the last one.
        ids, positions, blocks: of the step that is done, where each token is a block; those of the next one afterwards.
        turn: the number of the step, which grows by one, below N; and sequences.
        history: `found` of each step.

    The next kernel cannot begin before this one is done, as all that follow read what it writes, some of them before they wait.
    """

    def arguments() -> Any:
        rows, tokens = T.int64(), T.int64()
        found = argument("found", (rows, 3), "float32")
        streams = [argument("ids", (tokens,), "int64"), argument("positions", (tokens,), "int64"), argument("blocks", (tokens, 4), "int32")]
        return found, *streams, argument("turn", (2,), "int32"), argument("history", (T.int64(), rows, 3), "float32"), rows, tokens

    def body(operands: Any, _: Shared, __: Expr, thread: Expr) -> None:
        found, ids, positions, blocks, turn, history, rows, tokens = operands
        rows, tokens = T.cast(rows, "int32"), T.cast(tokens, "int32")
        grid_wait()
        step, last = T.Bind(turn[0]), T.Bind(turn[1] - 1)
        with strided(thread, tokens, THREADS) as token:
            position, first, best = T.Bind(positions[token]), T.Bind(blocks[token, 3]), T.Bind(found[T.min(token, last), 0])
            store(ids, T.cast(best, "int64"), token)
            store(positions, position + 1, token)
            store(blocks, first + 1, token, 3)
        with strided(thread, rows * 3, THREADS) as number:
            store(history, found[number // 3, number % 3], step, number // 3, number % 3)
        sync()  # all have read the number of the step
        with when(thread == 0):
            store(turn, step + 1, 0)

    return kernel("ahead", THREADS, arguments, lambda _: [1], body)
