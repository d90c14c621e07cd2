"""Views and permutations move down, towards the results, until they meet and cancel.

    %flat: f32[B*T, D] = aten.view.default(%x)             %y: f32[B, T, N] = linear(%x, @w)
    %y: f32[B*T, N] = linear(%flat, @w)             ->     (nothing)
    %z: f32[B, T, N] = aten.view.default(%y)

An operation that works on its last axes only does not care how the axes before them are grouped, and an elementwise one cares
about no axis.
"""

from __future__ import annotations

from itertools import takewhile

from moec.compiler.frontend.rewrite import Result, Rewriter, Rule, same_shape
from moec.compiler.frontend.rules.canonical import permute, view
from moec.compiler.ir import Dim, Node, TensorType

UNARY = (
    "neg", "rsqrt", "sqrt", "exp", "exp2", "log", "log1p", "sin", "cos", "tanh", "sigmoid", "silu", "gelu", "relu", "softplus",
    "abs", "clamp", "logical_not", "floor", "sign", "_to_copy", "expm1", "erf", "log2",
)  # fmt: skip
BINARY = (
    "mul.Tensor", "add.Tensor", "sub.Tensor", "div.Tensor", "pow.Tensor_Scalar", "maximum.default", "minimum.default",
    "logical_and.default", "logical_or.default", "logical_xor.default", "where.self", "pow.Tensor_Tensor",
    *(f"{name}.{kind}" for name in ("eq", "ne", "lt", "le", "gt", "ge") for kind in ("Tensor", "Scalar")),
)  # fmt: skip
_SUFFIX = {"linear": 1, "rms_norm": 1, "layer_norm": 1, "router": 1}
"""Semantic ops of one tensor and weights, and how many of the last axes they care about."""
_LAST_AXIS = ("_softmax.default", "topk.default", "sort.default", "cumsum.default", "slice.Tensor", "select.int")
_REDUCTIONS = ("sum.dim_IntList", "mean.dim", "amax.default", "amin.default")


def common_suffix(a: tuple[Dim, ...], b: tuple[Dim, ...]) -> int:
    """How many of the last axes two shapes share."""
    pairs = zip(reversed(a), reversed(b), strict=False)
    return len(list(takewhile(lambda pair: same_shape(pair[:1], pair[1:]), pairs)))


def _view_of_view(b: Rewriter, node: Node) -> Result:
    inner = b.made(node.inputs[0], "aten.view.default")
    return view(b, inner.inputs[0], node.outputs[0].type.shape) if inner else None


def _permute_of(b: Rewriter, node: Node) -> Result:
    x, dims = node.inputs[0], node.attrs["dims"]
    if (inner := b.made(x, "aten.permute.default")) is not None:
        return permute(b, inner.inputs[0], tuple(inner.attrs["dims"][d] for d in dims))
    shape = b.shape(x)
    kept = [d for d in dims if shape[d] != 1]
    if kept == sorted(kept):  # only axes of size one move
        return view(b, x, node.outputs[0].type.shape)
    if (inner := b.made(x, "aten.expand.default")) is not None:
        if (source := free_permute(b, inner.inputs[0], dims)) is not None:
            shape = node.outputs[0].type.shape
            return b.emit("aten.expand.default", [source], node.outputs[0].type, size=shape)
    return None


def free_permute(b: Rewriter, x: str, dims: tuple[int, ...]) -> str | None:
    """x with permuted axes, if that costs nothing: a permutation undone, or axes of size one moved."""
    shape = b.shape(x)
    if len(shape) != len(dims):
        return None
    kept = [d for d in dims if shape[d] != 1]
    if kept == sorted(kept):
        return view(b, x, tuple(shape[d] for d in dims))
    if (node := b.made(x, "aten.permute.default")) is not None:
        composed = tuple(node.attrs["dims"][d] for d in dims)
        return node.inputs[0] if composed == tuple(range(len(dims))) else None
    if (node := b.made(x, "aten.expand.default")) is not None and len(b.shape(node.inputs[0])) == len(dims):
        if (source := free_permute(b, node.inputs[0], dims)) is not None:
            wide = tuple(shape[d] for d in dims)
            return b.emit("aten.expand.default", [source], TensorType(b.type(x).dtype, wide), size=wide)
    return None


def inverse(dims: tuple[int, ...]) -> tuple[int, ...]:
    """The permutation that undoes `dims`."""
    return tuple(dims.index(i) for i in range(len(dims)))


def _past_view(suffix: int, of_axes: int | None = None) -> Rule:
    """op(view(y)) -> view(op(y)) where the view leaves the last `suffix` axes alone.

    An elementwise op (of no axes) would not care, but norms are easier to find when heads stay split.
    """
    shared, suffix = suffix, suffix if of_axes is None else of_axes

    def rule(b: Rewriter, node: Node) -> Result:
        inner = b.made(node.inputs[0], "aten.view.default")
        if inner is None:
            return None
        new, old = b.shape(node.inputs[0]), b.shape(inner.inputs[0])
        if common_suffix(new, old) < shared or len(old) < shared:
            return None
        attrs, tail = dict(node.attrs), len(new) - suffix
        if isinstance(attrs.get("dim"), int):
            attrs["dim"] += len(old) - len(new)
        elif isinstance(attrs.get("dim"), tuple):
            attrs["dim"] = tuple(d + len(old) - len(new) for d in attrs["dim"])
        kinds = [TensorType(o.type.dtype, (*old[: len(old) - suffix], *o.type.shape[tail:])) for o in node.outputs]
        results = b.emit_all(node.op, [inner.inputs[0], *node.inputs[1:]], kinds, attrs)
        return tuple(view(b, r, o.type.shape) for r, o in zip(results, node.outputs, strict=True))

    return rule


def _last_axis_past_view(b: Rewriter, node: Node) -> Result:
    rank = len(b.shape(node.inputs[0]))
    dims = node.attrs["dim"]
    first = min(dims, default=rank) if isinstance(dims, tuple) else dims
    return _past_view(rank - first)(b, node)


def _binary_past_view(b: Rewriter, node: Node) -> Result:
    """op(view(y), other) -> view(op(y, other')) where the other operands fit y after the same regrouping of leading axes."""
    shape = node.outputs[0].type.shape
    for position, name in enumerate(node.inputs):
        main = b.made(name, "aten.view.default")
        if main is None or not same_shape(b.shape(name), shape):
            continue
        old = b.shape(main.inputs[0])
        for suffix in range(common_suffix(shape, old), 0, -1):
            lead_new, lead_old = shape[: len(shape) - suffix], old[: len(old) - suffix]
            operands = [
                main.inputs[0] if i == position else _regrouped(b, other, lead_new, lead_old, suffix) for i, other in enumerate(node.inputs)
            ]
            if all(operands):
                kind = TensorType(node.outputs[0].type.dtype, old)
                return view(b, b.emit_all(node.op, [o for o in operands if o], [kind], node.attrs)[0], shape)
    return None


def _regrouped(b: Rewriter, x: str, new: tuple[Dim, ...], old: tuple[Dim, ...], suffix: int) -> str | None:
    """The operand x of shape new + tail as one of shape old + tail, if a view of it is at hand; a short x fits as it is."""
    shape = b.shape(x)
    if len(shape) <= suffix:
        return x
    tail = shape[len(shape) - suffix :]
    if not new:
        return None
    if all(d == 1 for d in shape[: len(shape) - suffix]):
        return view(b, x, tail)
    inner = b.made(x, "aten.view.default")
    if inner is None or not same_shape(shape, (*new, *tail)) or not same_shape(b.shape(inner.inputs[0]), (*old, *tail)):
        return None
    return inner.inputs[0]


def _gather_past_view(b: Rewriter, node: Node) -> Result:
    """gather(view(x), view(i)) along the last axis."""
    inners = [b.made(x, "aten.view.default") for x in node.inputs]
    shape = node.outputs[0].type.shape
    if inners[0] is None or inners[1] is None or node.attrs["dim"] != len(shape) - 1:
        return None
    x, index = (b.shape(i.inputs[0]) for i in inners if i)
    if not same_shape(x[:-1], index[:-1]) or common_suffix(x, b.shape(node.inputs[0])) < 1 or not same_shape(index[-1:], shape[-1:]):
        return None
    result = b.emit(node.op, [i.inputs[0] for i in inners if i], TensorType(b.type(node.inputs[0]).dtype, index), dim=len(x) - 1)
    return view(b, result, shape)


def _cat_past_view(b: Rewriter, node: Node) -> Result:
    """cat(view(x), view(y), ...) along the last axis, where the views regroup the axes before it alike."""
    out, olds = node.outputs[0].type, []
    inners = [b.made(x, "aten.view.default") for x in node.inputs]
    for name, inner in zip(node.inputs, inners, strict=True):
        if inner is None or common_suffix(b.shape(name), b.shape(inner.inputs[0])) < 1 or len(b.shape(name)) < 2:
            return None
        olds.append(b.shape(inner.inputs[0]))
    if node.attrs["dim"] != len(out.shape) - 1 or not all(same_shape(old[:-1], olds[0][:-1]) for old in olds):
        return None
    kind = TensorType(out.dtype, (*olds[0][:-1], out.shape[-1]))
    parts = [inner.inputs[0] for inner in inners if inner]
    return view(b, b.emit(node.op, parts, kind, tensors=len(parts), dim=len(kind.shape) - 1), out.shape)


def _unary_past_permute(b: Rewriter, node: Node) -> Result:
    inner = b.made(node.inputs[0], "aten.permute.default")
    if inner is None:
        return None
    kind = TensorType(node.outputs[0].type.dtype, b.shape(inner.inputs[0]))
    return permute(b, b.emit_all(node.op, inner.inputs, [kind], node.attrs)[0], inner.attrs["dims"])


def _suffix_past_permute(b: Rewriter, node: Node) -> Result:
    """A norm or projection of the last axis, when that stays last."""
    inner = b.made(node.inputs[0], "aten.permute.default")
    if inner is None or inner.attrs["dims"][-1] != len(inner.attrs["dims"]) - 1:
        return None
    kind = TensorType(node.outputs[0].type.dtype, (*b.shape(inner.inputs[0])[:-1], node.outputs[0].type.shape[-1]))
    return permute(b, b.emit_all(node.op, [*inner.inputs, *node.inputs[1:]], [kind], node.attrs)[0], inner.attrs["dims"])


def _view_of_permute(b: Rewriter, node: Node) -> Result:
    """view(permute(y)) -> permute(view(y)) where the view regroups only last axes that stay in place."""
    inner = b.made(node.inputs[0], "aten.permute.default")
    if inner is None:
        return None
    dims, new, old = inner.attrs["dims"], node.outputs[0].type.shape, b.shape(node.inputs[0])
    lead = len(dims)
    while lead and dims[lead - 1] == lead - 1:
        lead -= 1
    if lead == len(dims) or len(new) <= lead or not same_shape(new[:lead], old[:lead]):
        return None
    source = view(b, inner.inputs[0], (*b.shape(inner.inputs[0])[:lead], *new[lead:]))
    return permute(b, source, (*dims[:lead], *range(lead, len(new))))


def _select_past_permute(b: Rewriter, node: Node) -> Result:
    inner = b.made(node.inputs[0], "aten.permute.default")
    if inner is None:
        return None
    dims, at = inner.attrs["dims"], inner.attrs["dims"][node.attrs["dim"]]
    shape = b.shape(inner.inputs[0])
    kind = TensorType(node.outputs[0].type.dtype, (*shape[:at], *shape[at + 1 :]))
    rest = tuple(d - (d > at) for d in dims if d != at)
    return permute(b, b.emit(node.op, inner.inputs, kind, **{**node.attrs, "dim": at}), rest)


def _reduce_past_permute(b: Rewriter, node: Node) -> Result:
    inner = b.made(node.inputs[0], "aten.permute.default")
    if inner is None or not node.attrs["keepdim"]:
        return None
    dims = inner.attrs["dims"]
    at = tuple(sorted(dims[d] for d in node.attrs["dim"]))
    shape = tuple(1 if i in at else d for i, d in enumerate(b.shape(inner.inputs[0])))
    kind = TensorType(node.outputs[0].type.dtype, shape)
    return permute(b, b.emit(node.op, inner.inputs, kind, **{**node.attrs, "dim": at}), dims)


def _slice_past_permute(b: Rewriter, node: Node) -> Result:
    inner = b.made(node.inputs[0], "aten.permute.default")
    if inner is None:
        return None
    dims = inner.attrs["dims"]
    at = dims[node.attrs["dim"]]
    out = node.outputs[0].type
    kind = TensorType(out.dtype, tuple(out.shape[i] for i in inverse(dims)))
    return permute(b, b.emit_all(node.op, inner.inputs, [kind], {**node.attrs, "dim": at})[0], dims)


def _many_past_permute(b: Rewriter, node: Node) -> Result:
    """An elementwise op or `cat` of permuted tensors, where the other operands can be permuted for nothing."""
    shape = node.outputs[0].type.shape
    main = next((n for n in map(b.made, node.inputs) if n and n.op == "aten.permute.default"), None)
    if main is None or len(main.attrs["dims"]) != len(shape):
        return None
    dims = main.attrs["dims"]
    back = inverse(dims)
    operands = []
    for x in node.inputs:
        short = len(b.shape(x))
        if short < len(dims) and dims[len(dims) - short :] == tuple(range(len(dims) - short, len(dims))):
            operands.append(x)  # broadcasts over the axes that move
            continue
        moved = free_permute(b, x, back)
        if moved is None:
            return None
        operands.append(moved)
    attrs = {**node.attrs, "dim": dims[node.attrs["dim"]]} if "dim" in node.attrs else node.attrs
    kind = TensorType(node.outputs[0].type.dtype, tuple(shape[i] for i in back))
    return permute(b, b.emit_all(node.op, operands, [kind], attrs)[0], dims)


def _expand_of(b: Rewriter, node: Node) -> Result:
    inner = b.made(node.inputs[0], "aten.expand.default")
    return b.emit(node.op, inner.inputs, node.outputs[0].type, size=node.outputs[0].type.shape) if inner else None


def _op(name: str) -> str:
    return f"aten.{name}" if "." in name else f"aten.{name}.default"


RULES: dict[str, tuple[Rule, ...]] = {
    "aten.view.default": (_view_of_view, _view_of_permute),
    "aten.permute.default": (_permute_of,),
    "aten.expand.default": (_expand_of,),
    **{_op(name): (_past_view(1, of_axes=0), _unary_past_permute) for name in UNARY},
    **{_op(name): (_binary_past_view, _many_past_permute) for name in BINARY},
    **{name: (_past_view(suffix), _suffix_past_permute) for name, suffix in _SUFFIX.items()},
    **{_op(name): (_last_axis_past_view,) for name in (*_LAST_AXIS, *_REDUCTIONS)},
    "aten.slice.Tensor": (_last_axis_past_view, _slice_past_permute),
    "aten.select.int": (_last_axis_past_view, _select_past_permute),
    **{_op(name): (_last_axis_past_view, _reduce_past_permute) for name in _REDUCTIONS},
    "aten.cat.default": (_cat_past_view, _many_past_permute),
    "aten.gather.default": (_gather_past_view,),
}  # fmt: skip
