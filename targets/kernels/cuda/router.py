"""router of `moec.compiler.ops`, and plain top-k: a warp treats a token, whose scores lie in shared memory.

The best of the experts is found K times. Ties go to the lower index, and NaN counts as the largest number, so that ids are valid
whatever the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from moec.runtime.errors import MoecError
from moec.targets.kernels.cuda.emit import WARP, Expr, Shared, argument, kernel, local, store, strided, sync, when
from moec.targets.kernels.cuda.intrinsics import grid_launch, grid_wait
from moec.targets.kernels.cuda.layout import ceil_div
from moec.targets.kernels.cuda.warp import warp_argmax, warp_max, warp_sum
from moec.targets.kernels.specs import RouterSpec

HIGHEST, LOWEST, MASKED = 3.0e38, -2.0e38, -3.0e38  # of a choice: NaN, -inf, in a group that was not chosen
TAKEN = -3.4e38
MOST_VALUES = 8192  # of a row of top-k: they lie in shared memory


class _Choice:
    """Values [size] in shared memory, of which the best are taken one after the other."""

    def __init__(self, size: int, memory: Shared, lane: Expr) -> None:
        self.size, self.lane = size, lane
        self.values = memory.take((size,), "float32")

    def put(self, index: Expr, value: Expr) -> None:
        """Set a value; a barrier has to follow."""
        value, highest, lowest = T.Bind(value), T.float32(HIGHEST), T.float32(LOWEST)
        # A comparison with NaN fails, so NaN takes the last branch of both.
        store(self.values, T.Select(value <= lowest, lowest, T.Select(value < highest, value, highest)), index)

    def take(self) -> Expr:
        """The index (int32) of the best value, which is not taken again."""
        best, where = local(1, "float32"), local(1, "int32")
        store(best, T.float32(TAKEN), 0)
        store(where, T.int32(self.size - 1), 0)
        with strided(self.lane, self.size, WARP) as i:
            value = T.Bind(self.values[i])
            with when(value > best[0]):
                store(best, value, 0)
                store(where, T.cast(i, "int32"), 0)
        index = warp_argmax(best[0], where[0])
        sync()
        with when(self.lane == 0):
            store(self.values, T.float32(TAKEN), index)
        sync()
        return index


class _Router:
    def __init__(self, spec: RouterSpec, tokens: int | None) -> None:
        self.spec, self.tokens = spec, tokens
        self.words = sum(ceil_div(n, 4) * 4 for n in (spec.experts, spec.experts, spec.top_k, spec.groups, spec.groups))

    def arguments(self) -> Any:
        spec = self.spec
        tokens = self.tokens if self.tokens is not None else T.int64()
        self.logits = argument("logits", (tokens, spec.experts), "float32")
        self.bias = argument("bias", (spec.experts,), "float32") if spec.bias else None
        self.weights = argument("weights", (tokens, spec.top_k), "float32")
        self.ids = argument("ids", (tokens, spec.top_k), "int64")
        return tokens

    def body(self, _: Any, memory: Shared, token: Expr, lane: Expr) -> None:
        spec = self.spec
        grid_launch()
        grid_wait()
        logits = self._softmax(lambda i: self.logits[token, i], spec.experts, lane) if spec.score == "softmax" else None
        scores = memory.take((spec.experts,), "float32")
        choice = _Choice(spec.experts, memory, lane)
        with strided(lane, spec.experts, WARP) as i:
            score = self.logits[token, i] if logits is None else logits(self.logits[token, i])
            score = T.Bind(T.float32(1) / (T.float32(1) + T.exp(T.float32(0) - score)) if spec.score == "sigmoid" else score)
            store(scores, score, i)
            choice.put(i, score if self.bias is None else score + self.bias[i])
        sync()
        if spec.groups > 1:
            self._mask_groups(choice, memory, lane)
        chosen = memory.take((spec.top_k,), "float32")
        with T.serial(spec.top_k) as k:
            index = choice.take()
            with when(lane == 0):
                store(self.ids, T.cast(index, "int64"), token, k)
                store(chosen, scores[index], k)
        sync()
        weight = self._softmax(lambda k: chosen[k], spec.top_k, lane) if spec.score == "softmax_topk" else lambda score: score
        factor = T.float32(spec.scale)
        if spec.normalize:
            total = local(1, "float32")
            store(total, T.float32(0), 0)
            with T.serial(spec.top_k) as k:
                store(total, total[0] + weight(chosen[k]), 0)
            factor = T.Bind(T.float32(spec.scale) / total[0])
        with strided(lane, spec.top_k, WARP) as k:
            store(self.weights, weight(chosen[k]) * factor, token, k)

    def _softmax(self, load: Callable[[Expr], Expr], size: int, lane: Expr) -> Callable[[Expr], Expr]:
        """The softmax over some values, as a function of one of them."""
        register = local(1, "float32")
        store(register, T.float32(-3.4e38), 0)
        with strided(lane, size, WARP) as i:
            store(register, T.max(register[0], load(i)), 0)
        peak = warp_max(register[0])
        store(register, T.float32(0), 0)
        with strided(lane, size, WARP) as i:
            store(register, register[0] + T.exp(load(i) - peak), 0)
        inverse = T.Bind(T.float32(1) / warp_sum(register[0]))
        return lambda value: T.exp(value - peak) * inverse

    def _mask_groups(self, choice: _Choice, memory: Shared, lane: Expr) -> None:
        """Hide the experts of all but the best groups."""
        spec = self.spec
        size = spec.experts // spec.groups
        groups, kept = _Choice(spec.groups, memory, lane), memory.take((spec.groups,), "int32")
        with strided(lane, spec.groups, WARP) as group:
            best = local(2, "float32")
            store(best, T.float32(MASKED), 0)
            store(best, T.float32(MASKED), 1)
            with T.serial(size) as i:
                value = T.Bind(choice.values[group * size + i])
                store(best, T.max(best[1], T.min(value, best[0])), 1)
                store(best, T.max(best[0], value), 0)
            groups.put(group, best[0] + best[1] if spec.group_score == "top2" else best[0])
            store(kept, T.int32(0), group)
        sync()
        with T.serial(spec.top_groups):
            index = groups.take()
            with when(lane == 0):
                store(kept, T.int32(1), index)
        sync()
        with strided(lane, spec.experts, WARP) as i, when(kept[i // size] == 0):
            store(choice.values, T.float32(MASKED), i)
        sync()


def router_func(spec: RouterSpec, tokens: int | None) -> tirx.PrimFunc:
    """PrimFunc (logits float32 [T, E], [bias [E]], weights float32 [T, K], ids int64 [T, K])."""
    router = _Router(spec, tokens)
    return kernel("router", WARP, router.arguments, lambda count: [count], router.body, words=router.words)


def topk_func(size: int, k: int, largest: bool, rows: int | None) -> tirx.PrimFunc:
    """PrimFunc (x float32 [N, size], values float32 [N, k], indices int64 [N, k]): the k best of each row, best first.

    Raises:
        MoecError: the rows are too long.
    """
    if size > MOST_VALUES:
        raise MoecError(f"top-k of {size} values has no CUDA kernel: at most {MOST_VALUES}")

    def arguments() -> Any:
        count = rows if rows is not None else T.int64()
        x = argument("x", (count, size), "float32")
        values = argument("values", (count, k), "float32")
        return count, x, values, argument("indices", (count, k), "int64")

    def body(operands: Any, memory: Shared, n: Expr, lane: Expr) -> None:
        x, values, indices = operands[1:]
        grid_launch()
        grid_wait()
        choice = _Choice(size, memory, lane)
        sign: Callable[[Expr], Expr] = (lambda v: v) if largest else (lambda v: T.float32(0) - v)
        with strided(lane, size, WARP) as i:
            choice.put(i, sign(x[n, i]))
        sync()
        with T.serial(k) as j:
            index = choice.take()
            with when(lane == 0):
                store(values, x[n, index], n, j)
                store(indices, T.cast(index, "int64"), n, j)

    return kernel("topk", WARP, arguments, lambda o: [o[0]], body, words=ceil_div(size, 4) * 4)
