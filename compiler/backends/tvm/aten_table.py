"""Core ATen operators as Relax expressions: one row an operator.

These run what no semantic op stands for: rope variants, routers that were not recognised, gates of shared experts. Each function gets
the arguments by their ATen names, tensors as Relax expressions of the shapes in the graph with B = 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tvm import relax

from moec.compiler.backends.tvm.relax_types import dtype_of, shape_of, typed

Expr = Any
Result = Expr | Sequence[Expr]
Args = Mapping[str, Any]
"""Arguments by their ATen names, and `out`: the results' types (`relax.TensorType`)."""


def _axis(axis: int, rank: int) -> int:
    return axis % rank if rank else 0


def _axes(a: Args, rank: int) -> list[int] | None:
    dim = a.get("dim")
    if dim is None or dim in ((), []):
        return None
    return [_axis(d, rank) for d in (dim if isinstance(dim, (tuple, list)) else [dim])]


def cast(x: Expr, dtype: str) -> Expr:
    """A tensor, or a number, as a tensor of this element type."""
    if isinstance(x, (bool, int, float)):
        return relax.const(x, dtype)
    x = typed(x)
    return x if dtype_of(x) == dtype else typed(relax.op.astype(x, dtype))


def _kind(a: Args) -> str:
    return str(a["out"][0].dtype)


def _reshaped(a: Args) -> Expr:
    return relax.op.reshape(a["self"], a["out"][0].shape)


def _unary(op: Callable[[Expr], Expr]) -> Callable[[Args], Expr]:
    return lambda a: op(cast(a["self"], _kind(a)))


def _predicate(op: Callable[[Expr], Expr]) -> Callable[[Args], Expr]:
    return lambda a: op(a["self"])


def _binary(op: Callable[[Expr, Expr], Expr]) -> Callable[[Args], Expr]:
    def lower(a: Args) -> Expr:
        other = cast(a["other"], _kind(a))
        alpha = a.get("alpha", 1)
        if alpha not in (1, None):
            other = relax.op.multiply(other, relax.const(alpha, _kind(a)))
        return op(cast(a["self"], _kind(a)), other)

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
    kind, mode = _kind(a), a.get("rounding_mode")
    x, y = cast(a["self"], kind), cast(a["other"], kind)
    if mode is None:
        return relax.op.divide(x, y)
    if mode == "floor":
        return relax.op.floor_divide(x, y)
    return relax.op.trunc(relax.op.divide(x, y)) if kind.startswith("float") else relax.op.divide(x, y)


def _clamp(a: Args) -> Expr:
    x, kind = cast(a["self"], _kind(a)), _kind(a)
    if a.get("min") is not None:
        x = relax.op.maximum(x, cast(a["min"], kind))
    return x if a.get("max") is None else relax.op.minimum(x, cast(a["max"], kind))


def _reduce(op: Callable[..., Expr]) -> Callable[[Args], Expr]:
    def lower(a: Args) -> Expr:
        x = cast(a["self"], _kind(a))
        return op(x, axis=_axes(a, len(shape_of(x))), keepdims=bool(a.get("keepdim", False)))

    return lower


def _any(a: Args) -> Expr:
    x = cast(cast(a["self"], "bool"), "int32")
    return cast(relax.op.max(x, axis=_axes(a, len(shape_of(x))), keepdims=bool(a.get("keepdim", False))), "bool")


def _slice(a: Args) -> Expr:
    shape = shape_of(a["self"])
    axis = _axis(a.get("dim", 0), len(shape))
    size, begin, end = shape[axis], a.get("start") or 0, a.get("end")
    if isinstance(size, int):
        begin = max(begin + size, 0) if begin < 0 else min(begin, size)
        end = size if end is None or end > size else end + size if end < 0 else end
    elif begin == 0 and (end is None or (isinstance(end, int) and end >= 1 << 31)):
        return a["self"]
    return relax.op.strided_slice(a["self"], [axis], [begin], [end], [a.get("step", 1)], assume_inbound=True)


def _select(a: Args) -> Expr:
    shape = shape_of(a["self"])
    axis = _axis(a["dim"], len(shape))
    index = a["index"] % shape[axis] if isinstance(shape[axis], int) else a["index"]
    one = relax.op.strided_slice(a["self"], [axis], [index], [index + 1], [1], assume_inbound=True)
    return relax.op.reshape(one, a["out"][0].shape)


def _split(a: Args) -> Sequence[Expr]:
    shape = shape_of(a["self"])
    axis, position, parts = _axis(a.get("dim", 0), len(shape)), 0, []
    for kind in a["out"]:
        size = int(kind.shape[axis])
        parts.append(relax.op.strided_slice(a["self"], [axis], [position], [position + size], [1], assume_inbound=True))
        position += size
    return parts


def _permute(a: Args) -> Expr:
    return relax.op.permute_dims(a["self"], [_axis(d, len(shape_of(a["self"]))) for d in a["dims"]])


def _transpose(a: Args) -> Expr:
    order = list(range(len(shape_of(a["self"]))))
    first, second = (0, 1) if "dim0" not in a else (_axis(a["dim0"], len(order)), _axis(a["dim1"], len(order)))
    if len(order) > 1:
        order[first], order[second] = order[second], order[first]
    return relax.op.permute_dims(a["self"], order)


def _expand(a: Args) -> Expr:
    lead = len(a["out"][0].shape) - len(shape_of(a["self"]))
    x = relax.op.reshape(a["self"], [1] * lead + list(a["self"].ty.shape)) if lead else a["self"]
    return relax.op.broadcast_to(x, a["out"][0].shape)


def _cumsum(a: Args) -> Expr:
    return relax.op.cumsum(cast(a["self"], _kind(a)), axis=_axis(a["dim"], len(shape_of(a["self"]))))


def _softmax(a: Args) -> Expr:
    return relax.op.nn.softmax(cast(a["self"], _kind(a)), axis=a["dim"])


def _full(value: Any = None) -> Callable[[Args], Expr]:
    def lower(a: Args) -> Expr:
        number = a["fill_value"] if value is None else value
        return relax.op.broadcast_to(cast(number, _kind(a)), a["out"][0].shape)

    return lower


def _arange(a: Args) -> Expr:
    start, step = a.get("start") or 0, a.get("step", 1)
    count = a["out"][0].shape[0]
    indices = cast(relax.op.arange(0, count, 1, "int64"), _kind(a))
    return relax.op.add(relax.op.multiply(indices, relax.const(step, _kind(a))), relax.const(start, _kind(a)))


def _where(a: Args) -> Expr:
    return relax.op.where(a["condition"], cast(a["self"], _kind(a)), cast(a["other"], _kind(a)))


def _masked_fill(a: Args) -> Expr:
    return relax.op.where(a["mask"], cast(a["value"], _kind(a)), cast(a["self"], _kind(a)))


def _gather(a: Args) -> Expr:
    return relax.op.gather_elements(a["self"], a["index"], axis=a["dim"])


def _scatter(a: Args) -> Expr:
    source = a.get("src")
    if source is None:
        source = relax.op.broadcast_to(cast(a["value"], _kind(a)), a["index"].ty.shape)
    reduction = {None: "update", "add": "add", "multiply": "mul"}[a.get("reduce")]
    return relax.op.scatter_elements(a["self"], a["index"], source, axis=a["dim"], reduction=reduction)


def _scatter_add(a: Args) -> Expr:
    return relax.op.scatter_elements(a["self"], a["index"], a["src"], axis=a["dim"], reduction="add")


def _index_select(a: Args) -> Expr:
    return relax.op.take(a["self"], a["index"], axis=_axis(a["dim"], len(shape_of(a["self"]))), mode="clip")


def _matmul(first: str, second: str) -> Callable[[Args], Expr]:
    def lower(a: Args) -> Expr:
        product = relax.op.matmul(a[first], a[second])
        return relax.op.add(a["self"], product) if first == "mat1" else product

    return lower


def _pow(a: Args) -> Expr:
    kind, x, exponent = _kind(a), a["self"], a["exponent"]
    if exponent == 2:
        return relax.op.square(cast(x, kind))
    if exponent in (0.5, -0.5):
        return (relax.op.sqrt if exponent > 0 else relax.op.rsqrt)(cast(x, kind))
    return relax.op.power(cast(x, kind), cast(exponent, kind))


def _repeat(a: Args) -> Expr:
    return relax.op.tile(a["self"], list(a["repeats"]))


def _cat(a: Args) -> Expr:
    tensors = [cast(t, _kind(a)) for t in a["tensors"]]
    return relax.op.concat(tensors, axis=_axis(a.get("dim", 0), len(a["out"][0].shape)))


def _stack(a: Args) -> Expr:
    return relax.op.stack([cast(t, _kind(a)) for t in a["tensors"]], axis=_axis(a.get("dim", 0), len(a["out"][0].shape)))


def _softplus(a: Args) -> Expr:
    return relax.op.log(relax.op.add(relax.op.exp(a["self"]), relax.const(1.0, _kind(a))))


def _log1p(a: Args) -> Expr:
    return relax.op.log(relax.op.add(cast(a["self"], _kind(a)), relax.const(1.0, _kind(a))))


def _expm1(a: Args) -> Expr:
    return relax.op.subtract(relax.op.exp(cast(a["self"], _kind(a))), relax.const(1.0, _kind(a)))


def _reciprocal(a: Args) -> Expr:
    return relax.op.divide(relax.const(1.0, _kind(a)), cast(a["self"], _kind(a)))


def _remainder(a: Args) -> Expr:
    return relax.op.floor_mod(cast(a["self"], _kind(a)), cast(a["other"], _kind(a)))


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
    "_to_copy": lambda a: cast(a["self"], _kind(a)),
}  # fmt: skip
"""Operators whose result at a place depends on the inputs at that place only (with broadcasting)."""

IDENTITY = frozenset({"clone", "alias", "detach", "contiguous", "lift_fresh_copy"})
VIEWS = frozenset({"view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "flatten"})
"""Operators that keep the numbers in memory as they are."""

OTHERS: dict[str, Callable[[Args], Result]] = {
    "expand": _expand,
    "permute": _permute,
    "transpose": _transpose,
    "t": _transpose,
    "slice": _slice,
    "select": _select,
    "split": _split,
    "split_with_sizes": _split,
    "chunk": _split,
    "unbind": lambda a: [relax.op.reshape(part, kind.shape) for part, kind in zip(_unbound(a), a["out"], strict=True)],
    "cat": _cat,
    "stack": _stack,
    "repeat": _repeat,
    "gather": _gather,
    "scatter": _scatter,
    "scatter_add": _scatter_add,
    "index_select": _index_select,
    "embedding": lambda a: relax.op.take(a["weight"], a["indices"], axis=0, mode="clip"),
    "_softmax": _softmax,
    "softmax": _softmax,
    "_log_softmax": lambda a: relax.op.nn.log_softmax(a["self"], axis=a["dim"]),
    "sum": _reduce(_op.sum),
    "mean": _reduce(_op.mean),
    "prod": _reduce(_op.prod),
    "amax": _reduce(_op.max),
    "amin": _reduce(_op.min),
    "any": _any,
    "argmax": lambda a: cast(
        _op.argmax(a["self"], axis=_axis(a["dim"], len(shape_of(a["self"]))), keepdims=bool(a.get("keepdim", False))), _kind(a)
    ),
    "cumsum": _cumsum,
    "mm": _matmul("self", "mat2"),
    "bmm": _matmul("self", "mat2"),
    "matmul": _matmul("self", "other"),
    "addmm": _matmul("mat1", "mat2"),
    "full": _full(),
    "full_like": _full(),
    "new_full": _full(),
    "scalar_tensor": lambda a: relax.const(a["s"], _kind(a)),
    "zeros": _full(0),
    "zeros_like": _full(0),
    "new_zeros": _full(0),
    "ones": _full(1),
    "ones_like": _full(1),
    "new_ones": _full(1),
    "arange": _arange,
}


def _unbound(a: Args) -> list[Expr]:
    axis = _axis(a.get("dim", 0), len(shape_of(a["self"])))
    return [relax.op.strided_slice(a["self"], [axis], [i], [i + 1], [1], assume_inbound=True) for i in range(len(a["out"]))]


def reshape(a: Args) -> Expr:
    """A view operator."""
    return _reshaped(a)


def base_name(op: str) -> str:
    """`aten.add.Tensor` -> `add`."""
    return op.split(".")[1]


def supported(op: str) -> bool:
    """Whether there is a row for this operator."""
    if not op.startswith("aten."):
        return False
    name = base_name(op)
    return name == "topk" or name in ELEMENTWISE or name in OTHERS or name in VIEWS or name in IDENTITY
