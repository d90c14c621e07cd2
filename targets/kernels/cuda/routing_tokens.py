"""`routing_step` for several tokens: a block of threads has 16 of the experts and a token, or several.

The blocks of a token write their logits and meet at the token's own semaphore, and the warp that comes last chooses, as for one token. So
nothing waits for other tokens. Weights are read once for the tokens of a block, whose terms are columns of the same products, and out of
the L2 cache but for the first time. Logits of bfloat16 are those that a token has alone, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tvm import relax, tirx
from tvm.tirx.script import builder as T

from moec.targets.kernels.cpu.emit import tensor_shape
from moec.targets.kernels.cuda.arrival import SEMAPHORES, last_warp
from moec.targets.kernels.cuda.calls import Functions
from moec.targets.kernels.cuda.emit import WARP, Buffer, Expr, Shared, argument, kernel, local, store, sync, when
from moec.targets.kernels.cuda.intrinsics import grid_launch, grid_wait
from moec.targets.kernels.cuda.layout import ROWS, ceil_div
from moec.targets.kernels.cuda.linear import split_name
from moec.targets.kernels.cuda.projections_matrix import Matrices
from moec.targets.kernels.cuda.projections_row import Row
from moec.targets.kernels.cuda.router import Router
from moec.targets.kernels.cuda.routing_step import RoutingSpec, choose, routing_step_func


class _Matrix(Matrices):
    """The router's weights, and their products with the rows of a block's tokens; a warp adds up those of one token."""

    def __init__(self, spec: RoutingSpec, arrays: dict[str, Buffer], bias: Buffer | None, logits: Buffer) -> None:
        super().__init__(spec.product, [0], [arrays], [bias], [logits])
        self._logits, self._bias = logits, bias

    def _first_biases(self) -> Buffer | None:
        """The bias of the expert whose logit a lane adds up."""
        if self._bias is None:
            return None
        found = local(1, "float32")
        store(found, T.float32(0), 0)
        with when(self._adds):
            store(found, self._bias[self._expert], 0)
        return found

    @property
    def _expert(self) -> Expr:
        return self._first_tile * ROWS + self._lane

    @property
    def _adds(self) -> Expr:
        return T.And(self._lane < self.spec.outputs, self._expert < self._limit)

    def finish_token(self, partial: Buffer, own: Expr, token: Expr, factor: Expr | None) -> None:
        """Add up, by a warp, what all warps have of the block's token number `own`, and write it."""
        with when(self._adds):
            here = self._lane * self.spec.tokens + own
            total = sum((partial[split, here] for split in range(1, self.spec.splits)), partial[0, here])
            total = total if factor is None else total * factor
            store(self._logits, total if self._offsets is None else total + self._offsets[0], token, self._expert)


class _RoutingTokens:
    def __init__(self, spec: RoutingSpec) -> None:
        self.spec, self.router = spec, Router(spec.router)

    def arguments(self) -> Expr:
        """Declare the parameters -> T."""
        spec, product, norm = self.spec, self.spec.product, self.spec.product.norm
        count = spec.tokens if spec.tokens is not None else T.int64()
        wide, slots, (gate,) = (count, product.k), (count, spec.router.top_k), product.matrices
        self.choice_bias = argument("router_bias", (spec.router.experts,), "float32") if spec.router.bias else None
        self.semaphores = argument("semaphores", (SEMAPHORES,), "int32")
        x = argument("x", wide, "float32")
        residual = argument("residual", wide, "float32") if norm and norm.residual else None
        weight = argument("weight", (product.k,), "float32") if norm and norm.weight else None
        bias = argument("bias", (product.k,), "float32") if norm and norm.bias else None
        arrays = {name: argument(f"{name}0", shape, dtype) for name, (shape, dtype) in gate.layout.arrays().items()}
        gate_bias = argument("bias0", (spec.router.experts,), "float32") if gate.bias else None
        total = argument("total", wide, "float32") if norm and norm.residual else None
        normal = argument("normal", wide, "float32") if product.written else None
        terms = argument("terms", (spec.terms, *wide), "uint16") if spec.terms else None
        self.logits = argument("logits", (count, spec.router.experts), "float32")
        self.outs = argument("weights", slots, "float32"), argument("ids", slots, "int64")
        self.rows, self.matrix = (x, residual, weight, bias, total, normal, terms), _Matrix(spec, arrays, gate_bias, self.logits)
        return count

    def grid(self, count: Expr) -> list[Expr]:
        """Blocks of threads by experts and by tokens."""
        n = self.spec.product.tokens
        return [self.spec.product.grid, ceil_div(count, n) if isinstance(count, int) else T.cast((count + n - 1) // n, "int32")]

    def body(self, count: Expr, memory: Shared, part: Expr, turn: Expr, thread: Expr) -> None:
        """Compute all results."""
        spec, product, matrix, n = self.spec, self.spec.product, self.matrix, self.spec.product.tokens
        first, end = T.Bind(turn * n), count if isinstance(count, int) else T.Bind(T.cast(count, "int32"))
        tokens = [T.Bind(first + i) for i in range(n)]
        whole = isinstance(count, int) and count % n == 0
        places = tokens if whole or n == 1 else [T.Bind(T.min(token, end - 1)) for token in tokens]
        there = () if places is tokens else [token < end for token in tokens]
        row = Row(product, *self.rows[:-1], places, there, self.rows[-1])
        row.take(memory)
        partial = memory.take((product.splits, n * product.outputs), "float32")
        matrix.begin(part, thread, row)
        grid_wait()
        grid_launch()
        row.stage(part)
        matrix.multiply(row, partial)
        sync()
        if n == 1:
            row.finish(thread)
        with when(thread < n * WARP):
            own, lane = T.Bind(thread // WARP), T.Bind(thread % WARP)
            token = T.Bind(first + own)
            with when(token < end):
                matrix.finish_token(partial, own, token, row.factor if n == 1 else row.factor_of(own))
                last = last_warp(self.semaphores, token, product.grid)
                with when(last != 0):
                    choose(spec, self.router, self.logits, self.choice_bias, self.outs, token, lane)
        row.write(part)


def routing_tokens_func(spec: RoutingSpec) -> tirx.PrimFunc:
    """PrimFunc ([router bias], semaphores, x [T, D], ..., [sum], [row], [terms uint16 [terms, T, D]], logits [T, E], weights, ids [T, K]).

    The parameters are those of `routing_step_func`, but for the terms: the row as pairs of bfloat16, as `linear.split_func` makes them.
    """
    step = _RoutingTokens(spec)
    return kernel("routing_tokens", spec.product.threads, step.arguments, step.grid, step.body, words=spec.product.words)


def routing(functions: Functions, spec: RoutingSpec, inputs: Sequence[relax.Expr], terms: int) -> list[relax.Expr]:
    """Emit the kernel of a layer: the inputs and results of `routing_step_func`.

    Args:
        terms: of several tokens, make so many terms of the normalised rows too, for whoever asks for them (`linear.terms_of`).
    """
    product, (count, _) = spec.product, tensor_shape(inputs[1 + spec.router.bias])  # after the bias and the semaphores
    rows, slots = int(product.norm is not None and product.norm.residual) + product.written, (count, spec.router.top_k)
    outs: list[tuple[Any, str]] = [((count, product.k), "float32")] * rows
    outs += [((count, spec.router.experts), "float32"), (slots, "float32"), (slots, "int64")]
    if spec.tokens == 1:
        return functions.call("routing_step", spec, lambda: routing_step_func(spec), inputs, *outs)
    if not terms or not product.written:
        return functions.call("routing_tokens", spec, lambda: routing_tokens_func(spec), inputs, *outs)
    spec = replace(spec, terms=terms)
    outs.insert(rows, ((terms, count, product.k), "uint16"))
    found = functions.call("routing_tokens", spec, lambda: routing_tokens_func(spec), inputs, *outs)
    made = found.pop(rows)
    functions.once(split_name(terms), found[rows - 1], lambda: made)
    return found
