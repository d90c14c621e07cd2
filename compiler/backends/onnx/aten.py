"""The core ATen operators in ONNX: one table from the operator to a function of the lowering and the node."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from moec.compiler.ir import Node

if TYPE_CHECKING:
    from moec.compiler.backends.onnx.lower import Lowering

Rule = Callable[["Lowering", Node], str | Sequence[str]]

_ORDER = ("bool", "u8", "i8", "i16", "i32", "i64", "f16", "bf16", "f32", "f64")


def _operands(low: Lowering, node: Node, dtype: str, names: Sequence[str] = ("self", "other")) -> list[str]:
    """The two operands of an elementwise node in one element type, numbers among them as constants."""
    tensors = iter(node.inputs)
    return [low.number(node.attrs[n], dtype) if n in node.attrs else low.cast(next(tensors), dtype) for n in names]


def _promoted(low: Lowering, node: Node) -> str:
    """The element type in which operands of different types are compared."""
    kinds = [low.dtype(name) for name in node.inputs]
    if isinstance(node.attrs.get("other"), float):
        kinds.append("f32")
    return max(kinds, key=_ORDER.index)


def _unary(op: str) -> Rule:
    return lambda low, node: low.e.op(op, low.cast(node.inputs[0], node.outputs[0].type.dtype), stem=node.name)


def _binary(op: str) -> Rule:
    return lambda low, node: low.e.op(op, *_operands(low, node, node.outputs[0].type.dtype), stem=node.name)


def _compare(op: str, negate: bool = False) -> Rule:
    def rule(low: Lowering, node: Node) -> str:
        result = low.e.op(op, *_operands(low, node, _promoted(low, node)))
        return low.e.op("Not", result) if negate else result

    return rule


def _logical(op: str) -> Rule:
    return lambda low, node: low.e.op(op, *(low.cast(name, "bool") for name in node.inputs))


def _floor_divide(low: Lowering, node: Node) -> str:
    dtype = node.outputs[0].type.dtype
    x, y = _operands(low, node, dtype)
    if dtype.startswith("f"):
        return low.e.op("Floor", low.e.op("Div", x, y))
    return low.e.op("Div", low.e.op("Sub", x, low.e.op("Mod", x, y)), y)  # ONNX's integer division truncates


def _div_mode(low: Lowering, node: Node) -> str:
    mode, dtype = node.attrs.get("rounding_mode"), node.outputs[0].type.dtype
    if mode == "floor":
        return _floor_divide(low, node)
    quotient = low.e.op("Div", *_operands(low, node, dtype))
    if mode is None or not dtype.startswith("f"):
        return quotient
    return low.e.op("Mul", low.e.op("Sign", quotient), low.e.op("Floor", low.e.op("Abs", quotient)))


def _remainder(low: Lowering, node: Node) -> str:
    dtype = node.outputs[0].type.dtype
    x, y = _operands(low, node, dtype)
    if not dtype.startswith("f"):
        return low.e.op("Mod", x, y)
    return low.e.op("Sub", x, low.e.op("Mul", low.e.op("Floor", low.e.op("Div", x, y)), y))


def _pow(low: Lowering, node: Node) -> str:
    dtype = node.outputs[0].type.dtype
    return low.e.op("Pow", low.cast(node.inputs[0], dtype), low.number(node.attrs["exponent"], dtype))


def _number_pow(low: Lowering, node: Node) -> str:
    dtype = node.outputs[0].type.dtype
    return low.e.op("Pow", low.number(node.attrs["self"], dtype), low.cast(node.inputs[0], dtype))


def _composed(build: Callable[[Lowering, str, str], str]) -> Rule:
    """A function of one operand, made of several operators."""

    def rule(low: Lowering, node: Node) -> str:
        dtype = node.outputs[0].type.dtype
        return build(low, low.cast(node.inputs[0], dtype), dtype)

    return rule


def _gelu(low: Lowering, node: Node) -> str:
    return low.e.op("Gelu", low.value(node.inputs[0]), approximate=str(node.attrs.get("approximate", "none")))


def _clamp(low: Lowering, node: Node) -> str:
    dtype = node.outputs[0].type.dtype
    bounds = [low.number(node.attrs[n], dtype) if node.attrs.get(n) is not None else "" for n in ("min", "max")]
    return low.e.op("Clip", low.cast(node.inputs[0], dtype), *bounds)


def _where(low: Lowering, node: Node) -> str:
    dtype, tensors = node.outputs[0].type.dtype, list(node.inputs)
    condition = low.cast(tensors.pop(0), "bool")
    return low.e.op("Where", condition, *_operands(low, Node(node.op, tuple(tensors), node.outputs, node.attrs), dtype))


def _softmax(low: Lowering, node: Node) -> str:
    return low.e.op("Softmax", low.cast(node.inputs[0], node.outputs[0].type.dtype), axis=int(node.attrs["dim"]))


def _reduce(op: str) -> Rule:
    def rule(low: Lowering, node: Node) -> str:
        x = low.cast(node.inputs[0], node.outputs[0].type.dtype)
        axes = node.attrs["dim"]
        axes = axes if isinstance(axes, tuple) else (axes,)
        return low.e.op(op, x, low.e.const(axes), keepdims=int(bool(node.attrs.get("keepdim", False))))

    return rule


def _argmax(low: Lowering, node: Node) -> str:
    x, dim = low.value(node.inputs[0]), node.attrs.get("dim")
    if dim is None:
        x, dim = low.e.op("Reshape", x, low.e.const([-1])), 0
    return low.e.op("ArgMax", x, axis=int(dim), keepdims=int(bool(node.attrs.get("keepdim", False))))


def _any(low: Lowering, node: Node) -> str:
    found = low.e.op(
        "ReduceMax", low.cast_value(low.cast(node.inputs[0], "bool"), "i32"), low.e.const([node.attrs["dim"]]),
        keepdims=int(bool(node.attrs.get("keepdim", False))),
    )  # fmt: skip
    return low.cast_value(found, "bool")


def _cumsum(low: Lowering, node: Node) -> str:
    return low.e.op("CumSum", low.cast(node.inputs[0], node.outputs[0].type.dtype), low.e.const(np.int64(node.attrs["dim"])))


def _topk(low: Lowering, node: Node) -> Sequence[str]:
    a = node.attrs
    return low.e.multi(
        "TopK", [low.value(node.inputs[0]), low.shapes.dim(a["k"])], 2, axis=int(a["dim"]), largest=int(a.get("largest", True))
    )


def _sort(low: Lowering, node: Node) -> Sequence[str]:
    dim = int(node.attrs["dim"])
    size = low.shapes.dim(low.shape(node.inputs[0])[dim])
    return low.e.multi("TopK", [low.value(node.inputs[0]), size], 2, axis=dim, largest=int(node.attrs.get("descending", False)))


def _matmul(low: Lowering, node: Node) -> str:
    return low.e.op("MatMul", *(low.cast(n, node.outputs[0].type.dtype) for n in node.inputs), stem=node.name)


def _conv1d(low: Lowering, node: Node) -> str:
    a = node.attrs
    stride, padding, dilation = (_first(a.get(name, default)) for name, default in (("stride", 1), ("padding", 0), ("dilation", 1)))
    return low.e.op(
        "Conv", *(low.value(n) if n else "" for n in node.inputs), strides=[stride], pads=[padding, padding], dilations=[dilation],
        group=int(a.get("groups", 1)),
    )  # fmt: skip


def _first(value: int | tuple[int, ...]) -> int:
    return value[0] if isinstance(value, tuple) else value


def _softplus(low: Lowering, node: Node) -> str:
    beta = node.attrs.get("beta", 1)
    x = low.value(node.inputs[0])
    if beta == 1:
        return low.e.op("Softplus", x)
    factor = low.number(beta, "f32")
    return low.e.op("Div", low.e.op("Softplus", low.e.op("Mul", x, factor)), factor)


def _times(low: Lowering, x: str, factor: float, dtype: str) -> str:
    return low.e.op("Mul", x, low.number(factor, dtype))


RULES: dict[str, Rule] = {
    **{
        f"aten.{name}.default": _unary(op)
        for name, op in {
            "neg": "Neg", "abs": "Abs", "sign": "Sign", "floor": "Floor", "sqrt": "Sqrt", "exp": "Exp", "log": "Log", "erf": "Erf",
            "sin": "Sin", "cos": "Cos", "tanh": "Tanh", "sigmoid": "Sigmoid", "relu": "Relu",
        }.items()
    },
    **{f"aten.{name}.Tensor": _binary(op) for name, op in {"add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div"}.items()},
    "aten.pow.Tensor_Tensor": lambda low, node: low.e.op("Pow", *(low.cast(n, node.outputs[0].type.dtype) for n in node.inputs)),
    "aten.maximum.default": _binary("Max"),
    "aten.minimum.default": _binary("Min"),
    **{
        f"aten.{name}.{kind}": _compare(op, name == "ne")
        for name, op in {
            "eq": "Equal", "ne": "Equal", "lt": "Less", "le": "LessOrEqual", "gt": "Greater", "ge": "GreaterOrEqual",
        }.items()
        for kind in ("Tensor", "Scalar")
    },
    **{f"aten.logical_{name}.default": _logical(op) for name, op in {"and": "And", "or": "Or", "xor": "Xor", "not": "Not"}.items()},
    "aten.floor_divide.default": _floor_divide,
    "aten.div.Tensor_mode": _div_mode,
    "aten.remainder.Tensor": _remainder,
    "aten.pow.Tensor_Scalar": _pow,
    "aten.pow.Scalar": _number_pow,
    "aten.rsqrt.default": _composed(lambda low, x, _: low.e.op("Reciprocal", low.e.op("Sqrt", x))),
    "aten.silu.default": _composed(lambda low, x, _: low.e.op("Mul", x, low.e.op("Sigmoid", x))),
    "aten.exp2.default": _composed(lambda low, x, t: low.e.op("Exp", _times(low, x, math.log(2), t))),
    "aten.expm1.default": _composed(lambda low, x, t: low.e.op("Sub", low.e.op("Exp", x), low.number(1, t))),
    "aten.log1p.default": _composed(lambda low, x, t: low.e.op("Log", low.e.op("Add", x, low.number(1, t)))),
    "aten.log2.default": _composed(lambda low, x, t: _times(low, low.e.op("Log", x), 1 / math.log(2), t)),
    "aten.gelu.default": _gelu,
    "aten.softplus.default": _softplus,
    "aten.clamp.default": _clamp,
    "aten.where.self": _where,
    "aten._to_copy.default": lambda low, node: low.cast(node.inputs[0], node.outputs[0].type.dtype),
    "aten.sum.dim_IntList": _reduce("ReduceSum"),
    "aten.mean.dim": _reduce("ReduceMean"),
    "aten.amax.default": _reduce("ReduceMax"),
    "aten.amin.default": _reduce("ReduceMin"),
    "aten.argmax.default": _argmax,
    "aten.any.dim": _any,
    "aten.cumsum.default": _cumsum,
    "aten._softmax.default": _softmax,
    "aten.topk.default": _topk,
    "aten.sort.default": _sort,
    "aten.matmul.default": _matmul,
    "aten.conv1d.default": _conv1d,
}  # fmt: skip
"""Arithmetic, comparisons, reductions and products."""
