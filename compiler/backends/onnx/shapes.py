"""Symbolic shapes as ONNX values: dimensions are computed from the shapes of the model's inputs, and mostly need not be."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence

import numpy as np

from moec.compiler.backends.onnx.emit import Emitter
from moec.compiler.errors import MoecError
from moec.compiler.ir import Dim, Graph, dim_symbols

_OPS: dict[type[ast.operator], str] = {ast.Add: "Add", ast.Sub: "Sub", ast.Mult: "Mul", ast.FloorDiv: "Div", ast.Div: "Div", ast.Mod: "Mod"}


def symbol_sources(graph: Graph) -> dict[str, tuple[str, int]]:
    """For each symbol an input and the axis of it that has the symbol's size."""
    sources: dict[str, tuple[str, int]] = {}
    for value in graph.inputs:
        for axis, dim in enumerate(value.type.shape):
            if isinstance(dim, str) and dim_symbols(dim) == {dim}:
                sources.setdefault(dim, (value.name, axis))
    return sources


class Shapes:
    """Dimensions and shapes of one model as values."""

    def __init__(self, emitter: Emitter, sources: Mapping[str, tuple[str, int]]) -> None:
        self.e, self.sources = emitter, sources

    def dim(self, dim: Dim) -> str:
        """A dimension as int64[1]."""
        if isinstance(dim, int):
            return self.e.const([dim])
        return self._expression(ast.parse(dim, mode="eval").body, dim)

    def _expression(self, node: ast.expr, whole: str) -> str:
        match node:
            case ast.Constant(int(number)):
                return self.e.const([number])
            case ast.Name(name) if name in self.sources:
                source, axis = self.sources[name]
                return self.e.op("Shape", source, start=axis, end=axis + 1, stem=name)
            case ast.UnaryOp(ast.USub(), operand):
                return self.e.op("Neg", self._expression(operand, whole))
            case ast.BinOp(left, op, right) if type(op) in _OPS:
                return self.e.op(_OPS[type(op)], self._expression(left, whole), self._expression(right, whole))
            case ast.Call(ast.Name(("Max" | "Min") as name), args):
                return self.e.op(name, *(self._expression(a, whole) for a in args))
        raise MoecError(f"dimension {whole!r} cannot be computed from the symbols {sorted(self.sources)}")

    def scalar(self, dim: Dim) -> str:
        """A dimension as an int64 scalar."""
        if isinstance(dim, int):
            return self.e.const(np.int64(dim))
        return self.e.op("Squeeze", self.dim(dim), self.e.const([0]))

    def vector(self, shape: Sequence[Dim]) -> str:
        """A shape as int64[rank]."""
        fixed = [d for d in shape if isinstance(d, int)]
        if len(fixed) == len(shape):
            return self.e.const(fixed)
        return self.e.op("Concat", *(self.dim(d) for d in shape), axis=0)

    def reshape(self, x: str, old: Sequence[Dim], new: Sequence[Dim]) -> str:
        """x in another shape. Axes that stay and one that is left to ONNX need no computation."""
        if tuple(old) == tuple(new):
            return x
        kept = {i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a == b and isinstance(a, str)}
        template = [0 if i in kept else d if isinstance(d, int) else -1 for i, d in enumerate(new)]
        target = self.e.const(template) if template.count(-1) <= 1 else self.vector(new)
        return self.e.op("Reshape", x, target)
