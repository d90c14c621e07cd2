"""rms_norm and layer_norm of `moec.compiler.ops`, with the residual addition in front of them: a block normalises a group."""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from moec.targets.kernels.cuda.emit import WARP, Expr, Shared, argument, kernel, local, store, when
from moec.targets.kernels.cuda.intrinsics import grid_launch, grid_wait
from moec.targets.kernels.cuda.layout import ceil_div
from moec.targets.kernels.cuda.warp import block_sum
from moec.targets.kernels.specs import NormSpec

MOST_THREADS = 1024
VALUES = 4  # that a thread has where there are enough


class _Norm:
    def __init__(self, spec: NormSpec, tokens: int | None) -> None:
        self.spec, self.tokens = spec, tokens
        self.threads = min(MOST_THREADS, ceil_div(ceil_div(spec.size, VALUES), WARP) * WARP)
        self.per_thread = ceil_div(spec.size, self.threads)

    def arguments(self) -> Any:
        spec = self.spec
        shape = (self.tokens if self.tokens is not None else T.int64(), spec.groups * spec.size)
        self.x = argument("x", shape, "float32")
        self.residual = argument("residual", shape, "float32") if spec.residual else None
        self.weight = argument("weight", (spec.size,), "float32") if spec.weight else None
        self.bias = argument("bias", (spec.size,), "float32") if spec.bias else None
        self.total = argument("total", shape, "float32") if spec.residual else None
        self.out = argument("out", shape, "float32")
        return shape[0]

    def grid(self, tokens: Expr) -> list[Expr]:
        return [tokens, self.spec.groups]

    def body(self, _: Any, memory: Shared, token: Expr, group: Expr, thread: Expr) -> None:
        spec = self.spec
        grid_launch()
        values = local(self.per_thread, "float32")
        first = T.Bind(group * spec.size)

        def each(act: Any) -> None:
            for i in range(self.per_thread):
                index = i * self.threads + thread
                if (i + 1) * self.threads <= spec.size:
                    act(i, index)
                else:
                    with when(index < spec.size):
                        act(i, index)

        def parameter(buffer: Any) -> Any:
            found = local(self.per_thread, "float32")
            each(lambda i, index: store(found, buffer[index], i))
            return found

        weights = None if self.weight is None else parameter(self.weight)  # no kernel writes them: they need not wait
        biases = None if self.bias is None else parameter(self.bias)
        grid_wait()

        def load(i: int, index: Expr) -> None:
            value = self.x[token, first + index]
            store(values, value if self.residual is None else value + self.residual[token, first + index], i)

        for i in range(self.per_thread):
            store(values, T.float32(0), i)
        each(load)
        if self.residual is not None:  # after all loads, which a store would hold up
            each(lambda i, index: store(self.total, values[i], token, first + index))
        mean = None
        if spec.center:
            total = sum((values[i] for i in range(self.per_thread)), T.float32(0))
            mean = T.Bind(block_sum(total, memory, thread, self.threads) * T.float32(1 / spec.size))
            each(lambda i, _: store(values, values[i] - mean, i))  # what lies beyond the group stays zero
        square = block_sum(sum((values[i] * values[i] for i in range(self.per_thread)), T.float32(0)), memory, thread, self.threads)
        inverse = T.Bind(T.float32(1) / T.sqrt(square * T.float32(1 / spec.size) + T.float32(spec.eps)))

        def write(i: int, index: Expr) -> None:
            value = values[i] * inverse
            if weights is not None:
                value = value * (weights[i] + T.float32(spec.offset) if spec.offset else weights[i])
            if biases is not None:
                value = value + biases[i]
            store(self.out, value, token, first + index)

        each(write)


def norm_func(spec: NormSpec, tokens: int | None) -> tirx.PrimFunc:
    """PrimFunc (x [T, groups*size], [residual], [weight], [bias], [sum], out), all float32."""
    norm = _Norm(spec, tokens)
    return kernel("norm", norm.threads, norm.arguments, norm.grid, norm.body, words=2 * WARP)
