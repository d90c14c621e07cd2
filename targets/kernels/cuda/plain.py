"""linear and experts for GPUs whose tensor cores have no kernel here: a warp computes a number, whatever the architecture.

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
from moec.targets.kernels.cuda.embedding import element, weight_arguments
from moec.targets.kernels.cuda.emit import WARP, Expr, argument, const, kernel, local, store, strided, when
from moec.targets.kernels.cuda.experts_layout import ExpertsLayout, Stack
from moec.targets.kernels.cuda.intrinsics import grid_launch, grid_wait
from moec.targets.kernels.cuda.layout import FragmentLayout
from moec.targets.kernels.cuda.warp import warp_sum


def _dot(layout: FragmentLayout, weights: Any, lead: tuple[Expr, ...], row: Expr, x: Any, lane: Expr) -> Expr:
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


def hidden_func(layout: ExpertsLayout, activation: ExpertActivation, tokens: int | None, top_k: int, biases: bool) -> tirx.PrimFunc:
    """PrimFunc (x [T, D], ids [T, k], arrays of gate_up..., [bias], out [T, k, F])."""
    up = layout.gate_up

    def arguments() -> Any:
        count = tokens if tokens is not None else T.int64()
        x = argument("x", (count, layout.d), "float32")
        ids = argument("ids", (count, top_k), "int64")
        weights = Experts(up, "gate_up_")
        bias = argument("bias", (layout.experts, up.n), "float32") if biases else None
        return count, x, ids, weights, bias, argument("out", (count, top_k, layout.f), "float32")

    def body(operands: Any, _: Any, f: Expr, slot: Expr, token: Expr, lane: Expr) -> None:
        x, ids, weights, bias, out = operands[1:]
        grid_launch()
        grid_wait()
        expert = T.Bind(ids[token, slot])
        with when(T.And(expert >= 0, expert < layout.experts)):
            first = T.Bind(f // layout.tile_rows * 16 + f % layout.tile_rows)
            found = []
            for part in range(layout.parts):
                value = weights.dot(expert, first + 8 * part, lambda k: x[token, k], lane)
                found.append(value if bias is None else T.Bind(value + bias[expert, first + 8 * part]))
            with when(lane == 0):
                store(out, gated(activation, *found) if layout.gated else plain(activation, found[0]), token, slot, f)

    return kernel("hidden", WARP, arguments, lambda o: [layout.f, top_k, o[0]], body)


def combine_func(layout: ExpertsLayout, tokens: int | None, top_k: int, biases: bool, counted: bool = False) -> tirx.PrimFunc:
    """PrimFunc (hidden [T, k, F], ids, weights [T, k], arrays of down..., [bias], [counts int64 [8]], out [T, D])."""

    def arguments() -> Any:
        tokens_here = tokens if tokens is not None else T.int64()
        hidden = argument("hidden", (tokens_here, top_k, layout.f), "float32")
        ids = argument("ids", (tokens_here, top_k), "int64")
        routing = argument("routing", (tokens_here, top_k), "float32")
        weights = Experts(layout.down, "down_")
        bias = argument("bias", (layout.experts, layout.d), "float32") if biases else None
        counts = counts_argument(counted)
        return tokens_here, hidden, ids, routing, weights, bias, counts, argument("out", (tokens_here, layout.d), "float32")

    def body(operands: Any, _: Any, d: Expr, token: Expr, lane: Expr) -> None:
        hidden, ids, routing, weights, bias, counts, out = operands[1:]
        grid_launch()
        grid_wait()
        total = local(1, "float32")
        store(total, T.float32(0), 0)
        with T.serial(top_k) as slot:
            expert = T.Bind(ids[token, slot])
            with when(T.And(expert >= 0, expert < layout.experts)):
                value = weights.dot(expert, d, lambda k: hidden[token, slot, k], lane)
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
    """As `moec.targets.kernels.cuda.experts.experts`."""
    count, top_k = x.ty.shape[0], int(ids.ty.shape[1])
    up = [weights[name] for name in layout.arrays() if name.startswith("gate_up_")] + ([biases[0]] if biases else [])
    down = [weights[name] for name in layout.arrays() if name.startswith("down_")] + ([biases[1]] if biases else [])
    key = (layout, activation, None, top_k, biases is not None)
    (hidden,) = functions.call("hidden", key, lambda: hidden_func(*key), [x, ids, *up], ((count, top_k, layout.f), "float32"))
    last = (layout, None, top_k, biases is not None, counts is not None)
    combine = functions.get("combine", last, lambda: combine_func(*last))
    out = relax.TensorType((count, layout.d), "float32")
    return call_counting(functions.bb, combine, [hidden, ids, routing_weights, *down], counts, out)[0]
