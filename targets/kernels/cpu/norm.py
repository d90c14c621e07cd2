"""rms_norm and layer_norm of `moec.compiler.ops`, with the residual addition in front of them."""

from __future__ import annotations

from tvm import tirx
from tvm.tirx.script import builder as T

from moec.targets.kernels.cpu.emit import Expr, Register, argument, prim_func, splat, store, vector
from moec.targets.kernels.cpu.isa import Isa
from moec.targets.kernels.cpu.loops import over_row, over_tokens
from moec.targets.kernels.specs import NormSpec


class _Norm:
    def __init__(self, spec: NormSpec, tokens: int | None, isa: Isa) -> None:
        self.spec, self.tokens, self.isa = spec, tokens, isa

    def build(self) -> None:
        spec = self.spec
        width = spec.groups * spec.size
        tokens = self.tokens if self.tokens is not None else T.int64()
        self.x = argument("x", (tokens, width), "float32")
        self.residual = argument("residual", (tokens, width), "float32") if spec.residual else None
        self.weight = argument("weight", (spec.size,), "float32") if spec.weight else None
        self.bias = argument("bias", (spec.size,), "float32") if spec.bias else None
        self.total = argument("total", (tokens, width), "float32") if spec.residual else self.x
        self.out = argument("out", (tokens, width), "float32")
        over_tokens(tokens, width, self._row)

    def _row(self, token: Expr) -> None:
        spec, lanes = self.spec, self.isa.lanes
        if self.residual is not None:

            def add(i: Expr, w: int) -> None:
                store(self.total, vector(self.x, token, i, lanes=w) + vector(self.residual, token, i, lanes=w), token, i, lanes=w)

            over_row(spec.groups * spec.size, lanes, add)
        with T.serial(spec.groups) as group:
            self._group(token, group * spec.size)

    def _group(self, token: Expr, first: Expr) -> None:
        spec, lanes = self.spec, self.isa.lanes
        mean = T.Bind(self._sum(token, first, None) * T.float32(1 / spec.size)) if spec.center else None
        square = self._sum(token, first, T.float32(0) if mean is None else mean) * T.float32(1 / spec.size)
        inverse = T.Bind(T.float32(1) / T.sqrt(square + T.float32(spec.eps)))

        def write(i: Expr, w: int) -> None:
            value = vector(self.total, token, first + i, lanes=w)
            if mean is not None:
                value = value - splat(mean, "float32", w)
            value = value * splat(inverse, "float32", w)
            if self.weight is not None:
                weight = vector(self.weight, i, lanes=w)
                value = value * (weight + splat(spec.offset, "float32", w) if spec.offset else weight)
            if self.bias is not None:
                value = value + vector(self.bias, i, lanes=w)
            store(self.out, value, token, first + i, lanes=w)

        over_row(spec.size, lanes, write)

    def _sum(self, token: Expr, first: Expr, mean: Expr | None) -> Expr:
        """The sum of a group, or of its squared distances from the mean."""
        lanes = self.isa.lanes
        sums, rest = Register("float32", lanes), Register("float32", 1)
        sums.clear()
        rest.clear()

        def add(i: Expr, w: int) -> None:
            value = vector(self.total, token, first + i, lanes=w)
            if mean is not None:
                away = T.Bind(value - splat(mean, "float32", w))
                value = away * away
            target = sums if w > 1 or lanes == 1 else rest
            target.set(target.get() + value)

        over_row(self.spec.size, lanes, add)
        return T.Bind(rest.get() + T.call_llvm_pure_intrin("float32", "llvm.vector.reduce.fadd", T.float32(0), sums.get()))


def norm_func(spec: NormSpec, tokens: int | None, isa: Isa) -> tirx.PrimFunc:
    """PrimFunc (x [T, groups*size], [residual], [weight], [bias], [sum], out), all float32."""
    return prim_func(_Norm(spec, tokens, isa).build)
