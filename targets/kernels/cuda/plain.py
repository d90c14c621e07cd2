"""linear and experts for what the kernels of the tensor cores do not do: a warp computes a number, whatever the architecture.

That is many tokens on GPUs before compute capability 9.0 and after, weights in float32 and float16, and experts with low-rank factors.
One row of weights is read for each token, so this is slow for many of them; one token has better kernels on every GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tvm import relax, tirx
from tvm.tirx.script import builder as T

from moec.targets.kernels.cpu.activation_functions import ExpertActivation
from moec.targets.kernels.cuda.activation import gated, plain
from moec.targets.kernels.cuda.calls import Functions
from moec.targets.kernels.cuda.counting import EXPERTS, TOKENS, call_counting, count, counts_argument
from moec.targets.kernels.cuda.element import element, weight_arguments
from moec.targets.kernels.cuda.emit import WARP, Expr, argument, const, kernel, local, store, strided, when
from moec.targets.kernels.cuda.experts_layout import ExpertsLayout, Stack
from moec.targets.kernels.cuda.intrinsics import grid_launch, grid_wait
from moec.targets.kernels.cuda.layout import FragmentLayout
from moec.targets.kernels.cuda.warp import warp_sum


def _dot(layout: FragmentLayout, weights: Any, lead: tuple[Expr, ...], row: Expr, x: Any, lane: Expr) -> Expr:
    if layout.format == "zero":
        return T.float32(0)
    total = local(1, "float32")
    store(total, T.float32(0), 0)
    with strided(lane, layout.k, WARP) as k:
        store(total, total[0] + element(layout, weights, lead, row, k) * x(k), 0)
    return warp_sum(total[0])


class Experts:
    """The parameters of a stack of weights, and its rows."""

    def __init__(self, stack: Stack, prefix: str) -> None:
        self._classes = [
            (layout, weight_arguments(layout, len(stack.members(index)), prefix=f"{prefix}{index}_"))
            for index, layout in enumerate(stack.classes)
        ]
        self._table = argument(f"{prefix}table", (stack.experts, 2), "int32") if stack.mixed else None

    def dot(self, expert: Expr, row: Expr, x: Any, lane: Expr) -> Expr:
        """The product of a row of an expert with x(k)."""
        if self._table is None:
            layout, weights = self._classes[0]
            return _dot(layout, weights, (expert,), row, x, lane)
        kind, place = T.Bind(self._table[expert, 0]), T.Bind(self._table[expert, 1])
        found = local(1, "float32")
        store(found, T.float32(0), 0)
        for index, (layout, weights) in enumerate(self._classes):
            with when(kind == index):
                store(found, _dot(layout, weights, (place,), row, x, lane), 0)
        return found[0]


def linear_func(layout: FragmentLayout, tokens: int | None, bias: bool) -> tirx.PrimFunc:
    """PrimFunc (x, arrays..., [bias], out)."""

    def arguments() -> Any:
        count = tokens if tokens is not None else T.int64()
        x = argument("x", (count, layout.k), "float32")
        weights = weight_arguments(layout)
        offset = argument("bias", (layout.n,), "float32") if bias else None
        return count, x, weights, offset, argument("out", (count, layout.n), "float32")

    def body(operands: Any, _: Any, row: Expr, token: Expr, lane: Expr) -> None:
        x, weights, offset, out = operands[1:]
        grid_launch()
        grid_wait()
        found = _dot(layout, weights, (), row, lambda k: x[token, k], lane)
        with when(lane == 0):
            store(out, found if offset is None else found + offset[row], token, row)

    return kernel("linear", WARP, arguments, lambda o: [layout.n, o[0]], body)


def linear(functions: Functions, x: Any, weights: Mapping[str, Any], layout: FragmentLayout, bias: Any = None) -> relax.Expr:
    """As `moec.targets.kernels.cuda.linear.linear`."""
    args = [
        x,
        *(functions.bb.emit(relax.op.reshape(weights[name], shape)) for name, (shape, _) in layout.arrays().items()),
        *([] if bias is None else [bias]),
    ]
    key, out = ("plain", layout, bias is None), ((x.ty.shape[0], layout.n), "float32")
    return functions.call("linear", key, lambda: linear_func(layout, None, bias is not None), args, out)[0]


class Factors:
    """The parameters of the left factors of a projection, and what the right ones gave: inner [T, k, rank]."""

    def __init__(self, layout: ExpertsLayout, part: str, count: Expr, top_k: int) -> None:
        left = layout.stacks().get(f"{part}_left")
        self._left = Experts(left, f"{part}_left_") if left is not None else None
        self._inner = argument("inner", (count, top_k, left.k), "float32") if left is not None else None

    def add(self, value: Expr, expert: Expr, row: Expr, place: tuple[Expr, Expr], lane: Expr) -> Expr:
        """A number of the projection with what its factors add to it."""
        inner = self._inner
        if self._left is None or inner is None:
            return value
        return T.Bind(value + self._left.dot(expert, row, lambda k: inner[(*place, k)], lane))


def inner_func(stack: Stack, top_k: int, prefix: str, of_slots: bool) -> tirx.PrimFunc:
    """PrimFunc (x [T, K], or [T, k, K] where `of_slots`, ids [T, k], arrays of right factors..., out [T, k, rank])."""

    def arguments() -> Any:
        count = T.int64()
        x = argument("x", (count, top_k, stack.k) if of_slots else (count, stack.k), "float32")
        ids = argument("ids", (count, top_k), "int64")
        return count, x, ids, Experts(stack, prefix), argument("out", (count, top_k, stack.n), "float32")

    def body(operands: Any, _: Any, row: Expr, slot: Expr, token: Expr, lane: Expr) -> None:
        x, ids, weights, out = operands[1:]
        grid_launch()
        grid_wait()
        expert = T.Bind(ids[token, slot])
        with when(T.And(expert >= 0, expert < stack.experts)):
            value = T.Bind(weights.dot(expert, row, lambda k: x[token, slot, k] if of_slots else x[token, k], lane))
            with when(lane == 0):
                store(out, value, token, slot, row)

    return kernel("inner", WARP, arguments, lambda o: [stack.n, top_k, o[0]], body)


def hidden_func(layout: ExpertsLayout, activation: ExpertActivation, tokens: int | None, top_k: int, biases: bool) -> tirx.PrimFunc:
    """PrimFunc (x [T, D], ids [T, k], arrays of gate_up..., [arrays of left factors..., inner [T, k, rank]], [bias], out [T, k, F])."""
    up = layout.gate_up

    def arguments() -> Any:
        count = tokens if tokens is not None else T.int64()
        x = argument("x", (count, layout.d), "float32")
        ids = argument("ids", (count, top_k), "int64")
        weights = Experts(up, "gate_up_")
        factors = Factors(layout, "gate_up", count, top_k)
        bias = argument("bias", (layout.experts, up.n), "float32") if biases else None
        return count, x, ids, weights, factors, bias, argument("out", (count, top_k, layout.f), "float32")

    def body(operands: Any, _: Any, f: Expr, slot: Expr, token: Expr, lane: Expr) -> None:
        x, ids, weights, factors, bias, out = operands[1:]
        grid_launch()
        grid_wait()
        expert = T.Bind(ids[token, slot])
        with when(T.And(expert >= 0, expert < layout.experts)):
            first = T.Bind(f // layout.tile_rows * 16 + f % layout.tile_rows)
            found = []
            for part in range(layout.parts):
                value = weights.dot(expert, first + 8 * part, lambda k: x[token, k], lane)
                value = factors.add(value, expert, first + 8 * part, (token, slot), lane)
                found.append(value if bias is None else T.Bind(value + bias[expert, first + 8 * part]))
            with when(lane == 0):
                store(out, gated(activation, *found) if layout.gated else plain(activation, found[0]), token, slot, f)

    return kernel("hidden", WARP, arguments, lambda o: [layout.f, top_k, o[0]], body)


def combine_func(layout: ExpertsLayout, tokens: int | None, top_k: int, biases: bool, counted: bool = False) -> tirx.PrimFunc:
    """PrimFunc (hidden [T, k, F], ids, weights [T, k], arrays of down..., [of left..., inner], [bias], [counts int64 [8]], out [T, D])."""

    def arguments() -> Any:
        tokens_here = tokens if tokens is not None else T.int64()
        hidden = argument("hidden", (tokens_here, top_k, layout.f), "float32")
        ids = argument("ids", (tokens_here, top_k), "int64")
        routing = argument("routing", (tokens_here, top_k), "float32")
        weights = Experts(layout.down, "down_")
        factors = Factors(layout, "down", tokens_here, top_k)
        bias = argument("bias", (layout.experts, layout.d), "float32") if biases else None
        counts = counts_argument(counted)
        return tokens_here, hidden, ids, routing, weights, factors, bias, counts, argument("out", (tokens_here, layout.d), "float32")

    def body(operands: Any, _: Any, d: Expr, token: Expr, lane: Expr) -> None:
        hidden, ids, routing, weights, factors, bias, counts, out = operands[1:]
        grid_launch()
        grid_wait()
        total = local(1, "float32")
        store(total, T.float32(0), 0)
        with T.serial(top_k) as slot:
            expert = T.Bind(ids[token, slot])
            with when(T.And(expert >= 0, expert < layout.experts)):
                value = weights.dot(expert, d, lambda k: hidden[token, slot, k], lane)
                value = factors.add(value, expert, d, (token, slot), lane)
                value = value if bias is None else value + bias[expert, d]
                store(total, total[0] + routing[token, slot] * value, 0)
                if counts is not None:
                    with when(T.And(d == 0, lane == 0)):
                        count(counts, EXPERTS, const(1, "int32"))
        if counts is not None:
            with when(T.And(d == 0, lane == 0)):
                count(counts, TOKENS, const(1, "int32"))
        with when(lane == 0):
            store(out, total[0], token, d)

    return kernel("combine", WARP, arguments, lambda o: [layout.d, o[0]], body)


def experts(
    functions: Functions, x: Any, ids: Any, routing_weights: Any, weights: Mapping[str, Any], layout: ExpertsLayout,
    activation: ExpertActivation, biases: tuple[Any, Any] | None = None, counts: Any = None,
) -> relax.Expr:  # fmt: skip
    """As `moec.targets.kernels.cuda.experts.experts`; a layer may have low-rank factors."""
    count, top_k = x.ty.shape[0], int(ids.ty.shape[1])

    def arrays(part: str, source: Any) -> list[Any]:
        """The arrays of a projection, those of its left factors, and what the right ones give."""
        own = [weights[name] for name in layout.names(part)]
        if (right := layout.stacks().get(f"{part}_right")) is None:
            return own
        key = (right, top_k, f"{part}_right_", part == "down")
        args = [source, ids, *(weights[name] for name in layout.names(f"{part}_right"))]
        (inner,) = functions.call("inner", key, lambda: inner_func(*key), args, ((count, top_k, right.n), "float32"))
        return [*own, *(weights[name] for name in layout.names(f"{part}_left")), inner]

    up_bias, down_bias = ([biases[0]], [biases[1]]) if biases else ([], [])
    key, args = (layout, activation, None, top_k, biases is not None), [x, ids, *arrays("gate_up", x), *up_bias]
    (hidden,) = functions.call("hidden", key, lambda: hidden_func(*key), args, ((count, top_k, layout.f), "float32"))
    last = (layout, None, top_k, biases is not None, counts is not None)
    combine, args = functions.get("combine", last, lambda: combine_func(*last)), [hidden, ids, routing_weights, *arrays("down", hidden)]
    return call_counting(functions.bb, combine, [*args, *down_bias], counts, relax.TensorType((count, layout.d), "float32"))[0]
