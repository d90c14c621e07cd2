"""router of `moec.compiler.ops`, and plain top-k, as one kernel: scores, choice and weights of a token without leaving the stack.

The best of the experts is found K times. Ties go to the lower index, and NaN counts as the largest number, so that ids are valid
whatever the logits.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.tirx.script import builder as T

from moec.targets.kernels.cpu import math
from moec.targets.kernels.cpu.emit import Buffer, Expr, Register, argument, prim_func, splat, store, vector, when
from moec.targets.kernels.cpu.isa import Isa
from moec.targets.kernels.cpu.layout import ceil_div
from moec.targets.kernels.cpu.loops import over_row, over_tokens, stack
from moec.targets.kernels.specs import RouterSpec

HIGHEST, LOWEST, MASKED = 3.0e38, -2.0e38, -3.0e38  # of a choice: NaN, -inf, in a group that was not chosen
TAKEN = -3.4e38


class _Choice:
    """Values [size] on the stack, of which the best are taken one after the other."""

    def __init__(self, size: int, isa: Isa) -> None:
        self.size, self.lanes = size, isa.lanes
        self.padded = ceil_div(size, isa.lanes) * isa.lanes
        self.values = stack((self.padded,))

    def fill(self, load: Callable[[Expr, int], Expr]) -> None:
        """Set the values from `load(first, width)`."""
        lanes = self.lanes
        if self.padded > self.size:
            store(self.values, splat(TAKEN, "float32", lanes), self.padded - lanes, lanes=lanes)

        def put(i: Expr, w: int) -> None:
            value = T.Bind(load(i, w))
            highest, lowest = splat(HIGHEST, "float32", w), splat(LOWEST, "float32", w)
            # A comparison with NaN fails, so NaN takes the last branch of both.
            store(self.values, T.Select(value <= lowest, lowest, T.Select(value < highest, value, highest)), i, lanes=w)

        over_row(self.size, lanes, put)

    def take(self) -> Expr:
        """The index (int32) of the best value, which is not taken again."""
        lanes = self.lanes
        best, where = Register("float32", lanes), Register("int32", lanes)
        best.set(vector(self.values, 0, lanes=lanes))
        where.set(T.ramp(0, 1, lanes))
        if self.padded > lanes:
            with T.serial(1, self.padded // lanes) as i:
                value = T.Bind(vector(self.values, i * lanes, lanes=lanes))
                here = T.ramp(T.cast(i * lanes, "int32"), 1, lanes)
                where.set(T.Select(value > best.get(), here, where.get()))
                best.set(T.Select(value > best.get(), value, best.get()))
        peak = T.Bind(T.call_llvm_pure_intrin("float32", "llvm.vector.reduce.fmax", best.get()))
        at = T.Select(best.get() == splat(peak, "float32", lanes), where.get(), splat(self.padded - 1, "int32", lanes))
        index = T.Bind(T.min(T.call_llvm_pure_intrin("int32", "llvm.vector.reduce.smin", at), self.size - 1))
        store(self.values, T.float32(TAKEN), index)
        return index


class _Router:
    def __init__(self, spec: RouterSpec, tokens: int | None, isa: Isa) -> None:
        self.spec, self.tokens, self.isa = spec, tokens, isa

    def build(self) -> None:
        spec = self.spec
        tokens = self.tokens if self.tokens is not None else T.int64()
        self.logits = argument("logits", (tokens, spec.experts), "float32")
        self.bias = argument("bias", (spec.experts,), "float32") if spec.bias else None
        self.weights = argument("weights", (tokens, spec.top_k), "float32")
        self.ids = argument("ids", (tokens, spec.top_k), "int64")
        over_tokens(tokens, 8 * spec.experts, self._token)

    def _token(self, token: Expr) -> None:
        spec, lanes = self.spec, self.isa.lanes
        scores = stack((ceil_div(spec.experts, lanes) * lanes,))

        def load(buffer: Buffer) -> Callable[[Expr, int], Expr]:
            return lambda i, w: vector(buffer, i, lanes=w)

        def logit(i: Expr, w: int) -> Expr:
            return vector(self.logits, token, i, lanes=w)

        if spec.score == "sigmoid":
            over_row(spec.experts, lanes, lambda i, w: store(scores, math.sigmoid(logit(i, w), w), i, lanes=w))
        elif spec.score == "softmax":
            self._softmax(logit, scores, spec.experts)
        else:
            over_row(spec.experts, lanes, lambda i, w: store(scores, logit(i, w), i, lanes=w))
        choice = _Choice(spec.experts, self.isa)
        bias = self.bias
        choice.fill(load(scores) if bias is None else lambda i, w: vector(scores, i, lanes=w) + vector(bias, i, lanes=w))
        if spec.groups > 1:
            self._mask_groups(choice)
        chosen = stack((spec.top_k,))
        with T.serial(spec.top_k) as k:
            index = choice.take()
            store(self.ids, T.cast(index, "int64"), token, k)
            store(chosen, scores[index], k)
        if spec.score == "softmax_topk":
            self._softmax(lambda i, w: vector(chosen, i, lanes=w), chosen, spec.top_k)
        factor = Register("float32", 1)
        factor.set(T.float32(spec.scale))
        if spec.normalize:
            factor.clear()
            with T.serial(spec.top_k) as k:
                factor.set(factor.get() + chosen[k])
            factor.set(T.float32(spec.scale) / factor.get())
        with T.serial(spec.top_k) as k:
            store(self.weights, chosen[k] * factor.get(), token, k)

    def _softmax(self, load: Callable[[Expr, int], Expr], out: Buffer, size: int) -> None:
        peak, total = Register("float32", 1), Register("float32", 1)
        peak.set(T.float32(-3.4e38))
        total.clear()
        lanes = self.isa.lanes

        def largest(i: Expr, w: int) -> None:
            value = load(i, w)
            value = T.call_llvm_pure_intrin("float32", "llvm.vector.reduce.fmax", value) if w > 1 else value
            peak.set(T.max(peak.get(), value))

        def power(i: Expr, w: int) -> None:
            value = T.Bind(math.exp(load(i, w) - splat(peak.get(), "float32", w), w))
            store(out, value, i, lanes=w)
            value = T.call_llvm_pure_intrin("float32", "llvm.vector.reduce.fadd", T.float32(0), value) if w > 1 else value
            total.set(total.get() + value)

        over_row(size, lanes, largest)
        over_row(size, lanes, power)
        inverse = T.Bind(T.float32(1) / total.get())
        over_row(size, lanes, lambda i, w: store(out, vector(out, i, lanes=w) * splat(inverse, "float32", w), i, lanes=w))

    def _mask_groups(self, choice: _Choice) -> None:
        """Hide the experts of all but the best groups."""
        spec = self.spec
        size = spec.experts // spec.groups
        merits = stack((spec.groups,))
        with T.serial(spec.groups) as group:
            first, second = Register("float32", 1), Register("float32", 1)
            first.set(T.float32(MASKED))
            second.set(T.float32(MASKED))
            with T.serial(size) as i:
                value = T.Bind(choice.values[group * size + i])
                second.set(T.max(second.get(), T.min(value, first.get())))
                first.set(T.max(first.get(), value))
            store(merits, first.get() + second.get() if spec.group_score == "top2" else first.get(), group)
        groups = _Choice(spec.groups, self.isa)
        groups.fill(lambda i, w: vector(merits, i, lanes=w))
        kept = stack((spec.groups,), "int32")
        with T.serial(spec.groups) as group:
            store(kept, T.int32(0), group)
        with T.serial(spec.top_groups):
            store(kept, T.int32(1), groups.take())
        with T.serial(spec.groups) as group, when(kept[group] == 0), T.serial(size) as i:
            store(choice.values, T.float32(MASKED), group * size + i)


def router_func(spec: RouterSpec, tokens: int | None, isa: Isa) -> tirx.PrimFunc:
    """PrimFunc (logits float32 [T, E], [bias [E]], weights float32 [T, K], ids int64 [T, K])."""
    return prim_func(_Router(spec, tokens, isa).build)


def topk_func(size: int, k: int, largest: bool, rows: int | None, isa: Isa) -> tirx.PrimFunc:
    """PrimFunc (x float32 [N, size], values float32 [N, k], indices int64 [N, k]): the k best of each row, best first."""

    def build() -> None:
        count = rows if rows is not None else T.int64()
        x = argument("x", (count, size), "float32")
        values = argument("values", (count, k), "float32")
        indices = argument("indices", (count, k), "int64")

        def row(n: Expr) -> None:
            choice = _Choice(size, isa)
            sign = 1.0 if largest else -1.0
            choice.fill(lambda i, w: vector(x, n, i, lanes=w) * splat(sign, "float32", w))
            with T.serial(k) as j:
                index = choice.take()
                store(values, x[n, index], n, j)
                store(indices, T.cast(index, "int64"), n, j)

        over_tokens(count, 8 * size, row)

    return prim_func(build)
