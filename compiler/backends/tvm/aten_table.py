"""Core ATen operators as Relax expressions: one row an operator.

These run what no semantic op stands for: rope variants, routers that were not recognised, gates of shared experts. Each function gets
the arguments by their ATen names, tensors as Relax expressions of the shapes in the graph with B = 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import relax

from moec.compiler.backends.tvm.aten_elementwise import ELEMENTWISE, Args, Expr, Result, cast, result_dtype
from moec.compiler.backends.tvm.relax_types import shape_of
from moec.compiler.errors import MoecError


def _axis(axis: int, rank: int) -> int:
    return axis % rank if rank else 0


def _axes(a: Args, rank: int) -> list[int] | None:
    dim = a.get("dim")
    if dim is None or dim in ((), []):
        return None
    return [_axis(d, rank) for d in (dim if isinstance(dim, (tuple, list)) else [dim])]


def _reshaped(a: Args) -> Expr:
    return relax.op.reshape(a["self"], a["out"][0].shape)


def _reduce(op: Callable[..., Expr]) -> Callable[[Args], Expr]:
    def lower(a: Args) -> Expr:
        x = cast(a["self"], result_dtype(a))
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
    return relax.op.cumsum(cast(a["self"], result_dtype(a)), axis=_axis(a["dim"], len(shape_of(a["self"]))))


def _softmax(a: Args) -> Expr:
    return relax.op.nn.softmax(cast(a["self"], result_dtype(a)), axis=a["dim"])


def _full(value: Any = None) -> Callable[[Args], Expr]:
    def lower(a: Args) -> Expr:
        number = a["fill_value"] if value is None else value
        return relax.op.broadcast_to(cast(number, result_dtype(a)), a["out"][0].shape)

    return lower


def _arange(a: Args) -> Expr:
    start, step = a.get("start") or 0, a.get("step", 1)
    count = a["out"][0].shape[0]
    indices = cast(relax.op.arange(0, count, 1, "int64"), result_dtype(a))
    return relax.op.add(relax.op.multiply(indices, relax.const(step, result_dtype(a))), relax.const(start, result_dtype(a)))


def _gather(a: Args) -> Expr:
    return relax.op.gather_elements(a["self"], a["index"], axis=a["dim"])


def _scatter(a: Args) -> Expr:
    source = a.get("src")
    if source is None:
        source = relax.op.broadcast_to(cast(a["value"], result_dtype(a)), a["index"].ty.shape)
    reduction = {None: "update", "add": "add", "multiply": "mul"}[a.get("reduce")]
    return relax.op.scatter_elements(a["self"], a["index"], source, axis=a["dim"], reduction=reduction)


def _scatter_add(a: Args) -> Expr:
    return relax.op.scatter_elements(a["self"], a["index"], a["src"], axis=a["dim"], reduction="add")


def _index_select(a: Args) -> Expr:
    return relax.op.take(a["self"], a["index"], axis=_axis(a["dim"], len(shape_of(a["self"]))), mode="clip")


def _index(a: Args) -> Expr:
    if len(a["indices"]) != 1:
        raise MoecError(f"the tvm backend has no lowering for aten.index.Tensor with {len(a['indices'])} index tensors")
    return relax.op.take(a["self"], a["indices"][0], axis=0, mode="wrap")


def _matmul(first: str, second: str) -> Callable[[Args], Expr]:
    def lower(a: Args) -> Expr:
        product = relax.op.matmul(a[first], a[second])
        return relax.op.add(a["self"], product) if first == "mat1" else product

    return lower


def _repeat(a: Args) -> Expr:
    return relax.op.tile(a["self"], list(a["repeats"]))


def _cat(a: Args) -> Expr:
    tensors = [cast(t, result_dtype(a)) for t in a["tensors"]]
    return relax.op.concat(tensors, axis=_axis(a.get("dim", 0), len(a["out"][0].shape)))


def _stack(a: Args) -> Expr:
    return relax.op.stack([cast(t, result_dtype(a)) for t in a["tensors"]], axis=_axis(a.get("dim", 0), len(a["out"][0].shape)))


_op = relax.op

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
    "index": _index,
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
        _op.argmax(a["self"], axis=_axis(a["dim"], len(shape_of(a["self"]))), keepdims=bool(a.get("keepdim", False))), result_dtype(a)
    ),
    "cumsum": _cumsum,
    "mm": _matmul("self", "mat2"),
    "bmm": _matmul("self", "mat2"),
    "matmul": _matmul("self", "other"),
    "addmm": _matmul("mat1", "mat2"),
    "full": _full(),
    "full_like": _full(),
    "new_full": _full(),
    "scalar_tensor": lambda a: relax.const(a["s"], result_dtype(a)),
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
