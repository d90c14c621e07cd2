"""router of `moec.compiler.ops`, and plain top-k: a warp treats a token.

The router has its scores in registers, top-k of any size in shared memory. Ties go to the lower index, and NaN counts as the largest
number, so that ids are valid whatever the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from moec.runtime.errors import MoecError
from moec.targets.kernels.cuda.choice import MASKED, Choice, comparable
from moec.targets.kernels.cuda.emit import WARP, Buffer, Expr, Shared, argument, const, kernel, local, store, strided, sync, when
from moec.targets.kernels.cuda.intrinsics import grid_launch, grid_wait
from moec.targets.kernels.cuda.layout import ceil_div
from moec.targets.kernels.cuda.warp import warp_across, warp_argmax, warp_max, warp_sum, warp_sum_first
from moec.targets.kernels.specs import RouterSpec

LEAST = -3.4e38
MOST_EXPERTS = 1024  # 32 registers of a lane
MOST_SLOTS = WARP  # and groups: lanes have one each
MOST_VALUES = 8192  # of a row of top-k: they lie in shared memory


class Router:
    """The choice of a token's experts by a warp: lane l has the experts l * each to l * each + each - 1, then lane k has slot k.

    Raises:
        MoecError: the numbers of experts, groups or slots are too large.
    """

    def __init__(self, spec: RouterSpec) -> None:
        if spec.experts > MOST_EXPERTS or max(spec.groups, spec.top_k) > MOST_SLOTS:
            raise MoecError(
                f"a router of {spec.experts} experts in {spec.groups} groups, {spec.top_k} at a time, has no CUDA kernel: expected at most "
                f"{MOST_EXPERTS} experts, {MOST_SLOTS} groups and {MOST_SLOTS} at a time"
            )
        self.spec, self.each = spec, ceil_div(spec.experts, WARP)
        if spec.groups > 1:  # a group lies in a power of two of lanes
            size = spec.experts // spec.groups
            self.each = next(n for n in range(self.each, size + 1) if size % n == 0 and (size // n).bit_count() == 1)

    def run(self, load: Callable[[Expr], Expr], bias: Buffer | None, lane: Expr) -> tuple[Expr, Expr]:
        """The weight (float32) and id (int32) of slot k in lane k, from the logit of each expert. All lanes come here."""
        spec = self.spec
        index = [T.Bind(lane * self.each + i) for i in range(self.each)]
        logits, scores, values = (local(self.each, "float32") for _ in range(3))
        present = None if self.each * WARP == spec.experts else lambda i: index[i] < spec.experts
        for i in range(self.each):
            store(logits, T.float32(LEAST), i)
            store(values, T.float32(0), i)
            with _if(present, i):
                store(logits, load(index[i]), i)
                if bias is not None:
                    store(values, bias[index[i]], i)
        score = self._softmax([logits[i] for i in range(self.each)], present) if spec.score == "softmax" else self._score
        for i in range(self.each):
            store(scores, score(logits[i]), i)
            store(values, comparable(scores[i] + values[i] if bias is not None else scores[i]), i)
        if spec.groups > 1:
            self._mask_groups(values, lane)
        choice = Choice([values[i] for i in range(self.each)], lane, present)
        chosen, ids = local(1, "float32"), local(1, "int32")
        store(chosen, T.float32(0), 0)
        store(ids, const(0, "int32"), 0)
        with T.serial(spec.top_k) as k:
            which, its = choice.take([scores[i] for i in range(self.each)])
            with when(lane == T.cast(k, "int32")):
                store(ids, which, 0)
                store(chosen, its, 0)
        if spec.score == "softmax_topk":
            weight = self._softmax([chosen[0]], lambda _: lane < spec.top_k)
            store(chosen, weight(chosen[0]), 0)
        factor = T.float32(spec.scale)
        if spec.normalize:
            factor = factor / warp_sum_first(chosen[0], spec.top_k)
        return T.Bind(chosen[0] * factor), T.Bind(ids[0])

    def _score(self, logit: Expr) -> Expr:
        one = T.float32(1)
        return T.Bind(one / (one + T.exp(T.float32(0) - logit))) if self.spec.score == "sigmoid" else logit

    def _softmax(self, own: list[Expr], present: Callable[[int], Expr] | None) -> Callable[[Expr], Expr]:
        """The softmax over what the lanes have, as a function of one of the values."""
        register = local(1, "float32")
        store(register, T.float32(LEAST), 0)
        for i, value in enumerate(own):
            with _if(present, i):
                store(register, T.max(register[0], value), 0)
        peak = warp_max(register[0])
        store(register, T.float32(0), 0)
        for i, value in enumerate(own):
            with _if(present, i):
                store(register, register[0] + T.exp(value - peak), 0)
        inverse = T.Bind(T.float32(1) / warp_sum(register[0]))
        return lambda value: T.Bind(T.exp(value - peak) * inverse)

    def _mask_groups(self, values: Buffer, lane: Expr) -> None:
        """Hide the experts of all but the best groups."""
        spec, best = self.spec, local(2, "float32")
        lanes = spec.experts // spec.groups // self.each
        store(best, values[0], 0)
        store(best, T.float32(MASKED), 1)

        def add(first: Expr, second: Expr) -> None:
            """Take another one's two best values into account."""
            store(best, T.max(T.max(best[1], second), T.min(best[0], first)), 1)
            store(best, T.max(best[0], first), 0)

        for i in range(1, self.each):
            add(values[i], T.float32(MASKED))
        for distance in (2**i for i in range(lanes.bit_length() - 1)):
            add(warp_across(best[0], distance, "float32"), warp_across(best[1], distance, "float32"))
        merit = comparable(best[0] + best[1] if spec.group_score == "top2" else best[0])
        groups, kept = Choice([merit], lane, lambda _: T.And(lane % lanes == 0, lane < spec.groups * lanes)), local(1, "int32")
        store(kept, const(0, "int32"), 0)
        with T.serial(spec.top_groups):
            which, _ = groups.take([merit])
            with when(lane // lanes == which // lanes):
                store(kept, const(1, "int32"), 0)
        with when(kept[0] == 0):
            for i in range(self.each):
                store(values, T.float32(MASKED), i)


def _if(present: Callable[[int], Expr] | None, i: int) -> Any:
    return when(T.bool(True) if present is None else present(i))


def router_func(spec: RouterSpec, tokens: int | None) -> tirx.PrimFunc:
    """PrimFunc (logits float32 [T, E], [bias [E]], weights float32 [T, K], ids int64 [T, K])."""
    router = Router(spec)

    def arguments() -> Any:
        count = tokens if tokens is not None else T.int64()
        logits = argument("logits", (count, spec.experts), "float32")
        bias = argument("bias", (spec.experts,), "float32") if spec.bias else None
        weights = argument("weights", (count, spec.top_k), "float32")
        return count, logits, bias, weights, argument("ids", (count, spec.top_k), "int64")

    def body(operands: Any, _: Shared, token: Expr, lane: Expr) -> None:
        _, logits, bias, weights, ids = operands
        grid_launch()
        grid_wait()
        weight, which = router.run(lambda i: logits[token, i], bias, lane)
        with when(lane < spec.top_k):
            store(weights, weight, token, lane)
            store(ids, T.cast(which, "int64"), token, lane)

    return kernel("router", WARP, arguments, lambda o: [o[0]], body)


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
        left = memory.take((size,), "float32")
        sign: Callable[[Expr], Expr] = (lambda v: v) if largest else (lambda v: T.float32(0) - v)
        with strided(lane, size, WARP) as i:
            store(left, comparable(sign(x[n, i])), i)
        sync()
        with T.serial(k) as j:
            index = _take(left, size, lane)
            with when(lane == 0):
                store(values, x[n, index], n, j)
                store(indices, T.cast(index, "int64"), n, j)

    return kernel("topk", WARP, arguments, lambda o: [o[0]], body, words=ceil_div(size, 4) * 4)


def _take(left: Buffer, size: int, lane: Expr) -> Expr:
    """The index (int32) of the best value in shared memory, which is not taken again."""
    best, where = local(1, "float32"), local(1, "int32")
    store(best, T.float32(LEAST), 0)
    store(where, const(size - 1, "int32"), 0)
    with strided(lane, size, WARP) as i:
        value = T.Bind(left[i])
        with when(value > best[0]):
            store(best, value, 0)
            store(where, T.cast(i, "int32"), 0)
    index = warp_argmax(best[0], where[0])
    sync()
    with when(lane == 0):
        store(left, T.float32(LEAST), index)
    sync()
    return index
