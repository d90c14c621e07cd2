"""Element-wise core ATen operators as Relax expressions: what a result is at a place depends on the inputs at that place only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tvm import relax

from moec.compiler.backends.tvm.relax_types import dtype_of, typed

Expr = Any

Result = Expr | Sequence[Expr]

Args = Mapping[str, Any]
"""Arguments by their ATen names, and `out`: the results' types (`relax.TensorType`)."""


def cast(x: Expr, dtype: str) -> Expr:
    """A tensor, or a number, as a tensor of this element type."""
    if isinstance(x, (bool, int, float)):
        return relax.const(x, dtype)
    x = typed(x)
    return x if dtype_of(x) == dtype else typed(relax.op.astype(x, dtype))


def result_dtype(a: Args) -> str:
    """The element type of the (first) result."""
    return str(a["out"][0].dtype)


def _unary(op: Callable[[Expr], Expr]) -> Callable[[Args], Expr]:
    return lambda a: op(cast(a["self"], result_dtype(a)))


def _predicate(op: Callable[[Expr], Expr]) -> Callable[[Args], Expr]:
    return lambda a: op(a["self"])


def _binary(op: Callable[[Expr, Expr], Expr]) -> Callable[[Args], Expr]:
    def lower(a: Args) -> Expr:
        other = cast(a["other"], result_dtype(a))
        alpha = a.get("alpha", 1)
        if alpha not in (1, None):
            other = relax.op.multiply(other, relax.const(alpha, result_dtype(a)))
        return op(cast(a["self"], result_dtype(a)), other)

    return lower


def _compare(op: Callable[[Expr, Expr], Expr]) -> Callable[[Args], Expr]:
    def lower(a: Args) -> Expr:
        kinds = [dtype_of(x) for x in (a["self"], a["other"]) if isinstance(x, relax.Expr)]
        fraction = any(isinstance(a[name], float) for name in ("self", "other"))
        widest = max(kinds, key=lambda k: (k.startswith("float"), k != "bool", int("".join(filter(str.isdigit, k)) or 1)))
        kind = "float32" if fraction and not widest.startswith("float") else widest
        return op(cast(a["self"], kind), cast(a["other"], kind))

    return lower


def _divide(a: Args) -> Expr:
    kind, mode = result_dtype(a), a.get("rounding_mode")
    x, y = cast(a["self"], kind), cast(a["other"], kind)
    if mode is None:
        return relax.op.divide(x, y)
    if mode == "floor":
        return relax.op.floor_divide(x, y)
    return relax.op.trunc(relax.op.divide(x, y)) if kind.startswith("float") else relax.op.divide(x, y)


def _clamp(a: Args) -> Expr:
    x, kind = cast(a["self"], result_dtype(a)), result_dtype(a)
    if a.get("min") is not None:
        x = relax.op.maximum(x, cast(a["min"], kind))
    return x if a.get("max") is None else relax.op.minimum(x, cast(a["max"], kind))


def _where(a: Args) -> Expr:
    return relax.op.where(a["condition"], cast(a["self"], result_dtype(a)), cast(a["other"], result_dtype(a)))


def _masked_fill(a: Args) -> Expr:
    return relax.op.where(a["mask"], cast(a["value"], result_dtype(a)), cast(a["self"], result_dtype(a)))


def _pow(a: Args) -> Expr:
    kind, x, exponent = result_dtype(a), a["self"], a["exponent"]
    if exponent == 2:
        return relax.op.square(cast(x, kind))
    if exponent in (0.5, -0.5):
        return (relax.op.sqrt if exponent > 0 else relax.op.rsqrt)(cast(x, kind))
    return relax.op.power(cast(x, kind), cast(exponent, kind))


def _softplus(a: Args) -> Expr:
    return relax.op.log(relax.op.add(relax.op.exp(a["self"]), relax.const(1.0, result_dtype(a))))


def _log1p(a: Args) -> Expr:
    return relax.op.log(relax.op.add(cast(a["self"], result_dtype(a)), relax.const(1.0, result_dtype(a))))


def _expm1(a: Args) -> Expr:
    return relax.op.subtract(relax.op.exp(cast(a["self"], result_dtype(a))), relax.const(1.0, result_dtype(a)))


def _reciprocal(a: Args) -> Expr:
    return relax.op.divide(relax.const(1.0, result_dtype(a)), cast(a["self"], result_dtype(a)))


def _remainder(a: Args) -> Expr:
    return relax.op.floor_mod(cast(a["self"], result_dtype(a)), cast(a["other"], result_dtype(a)))


def _gelu(a: Args) -> Expr:
    return (relax.op.nn.gelu_tanh if a.get("approximate") == "tanh" else relax.op.nn.gelu)(a["self"])


_op, _nn = relax.op, relax.op.nn

ELEMENTWISE: dict[str, Callable[[Args], Result]] = {
    **{name: _unary(getattr(_op, relax_name)) for name, relax_name in {
        "neg": "negative", "exp": "exp", "log": "log", "sqrt": "sqrt", "rsqrt": "rsqrt", "sin": "sin", "cos": "cos", "tanh": "tanh",
        "sigmoid": "sigmoid", "abs": "abs", "floor": "floor", "ceil": "ceil", "round": "round", "trunc": "trunc", "erf": "erf",
        "sign": "sign",
    }.items()},
    **{name: _binary(getattr(_op, relax_name)) for name, relax_name in {
        "add": "add", "sub": "subtract", "mul": "multiply", "maximum": "maximum", "minimum": "minimum",
        "floor_divide": "floor_divide", "logical_and": "logical_and", "logical_or": "logical_or", "logical_xor": "logical_xor",
        "bitwise_and": "bitwise_and", "bitwise_or": "bitwise_or", "bitwise_xor": "bitwise_xor",
    }.items()},
    **{name: _compare(getattr(_op, relax_name)) for name, relax_name in {
        "eq": "equal", "ne": "not_equal", "lt": "less", "le": "less_equal", "gt": "greater", "ge": "greater_equal",
    }.items()},
    "silu": _unary(_nn.silu),
    "relu": _unary(_nn.relu),
    "gelu": _gelu,
    "softplus": _softplus,
    "log1p": _log1p,
    "expm1": _expm1,
    "square": _unary(_op.square),
    "reciprocal": _reciprocal,
    "remainder": _remainder,
    "logical_not": lambda a: _op.logical_not(cast(a["self"], "bool")),
    "bitwise_not": lambda a: (_op.logical_not if dtype_of(a["self"]) == "bool" else _op.bitwise_not)(a["self"]),
    "isnan": _predicate(_op.isnan),
    "isinf": _predicate(_op.isinf),
    "div": _divide,
    "pow": _pow,
    "clamp": _clamp,
    "where": _where,
    "masked_fill": _masked_fill,
    "_to_copy": lambda a: cast(a["self"], result_dtype(a)),
}  # fmt: skip
"""Operators whose result at a place depends on the inputs at that place only (with broadcasting)."""
