"""One spelling for each ATen operation.

Squeeze, unsqueeze, flatten and reshape become `view` with the full shape, transposes become `permute` with non-negative axes, the
many constructors become `full` and `arange`, splits become slices, and operations that only concern memory disappear.
"""

from __future__ import annotations

from typing import Any

from moec.compiler.frontend.rewrite import Result, Rewriter, Rule, same_shape
from moec.compiler.ir import Attr, Dim, Node, TensorType


def view(b: Rewriter, x: str, shape: tuple[Dim, ...]) -> str:
    """x in another shape."""
    if same_shape(b.shape(x), shape):
        return x
    return b.emit("aten.view.default", [x], TensorType(b.type(x).dtype, shape), size=shape)


def permute(b: Rewriter, x: str, dims: tuple[int, ...]) -> str:
    """x with its axes in another order."""
    if dims == tuple(range(len(dims))):
        return x
    shape = b.shape(x)
    return b.emit("aten.permute.default", [x], TensorType(b.type(x).dtype, tuple(shape[d] for d in dims)), dims=dims)


def number_op(b: Rewriter, op: str, x: str, other: Attr) -> str:
    """`op` of x and a number."""
    return b.emit(op, [x], b.type(x), other=other)


def axis(b: Rewriter, node: Node, name: str = "dim", default: int = 0) -> int:
    """A node's axis attribute as a non-negative number."""
    value = int(node.attrs.get(name, default))
    return value % max(len(b.shape(node.inputs[0])), 1)


def _is(op: str, **fixed: Attr) -> Rule:
    """The same op under another name, with attributes added."""

    def rule(b: Rewriter, node: Node) -> Result:
        return b.emit_all(op, node.inputs, [o.type for o in node.outputs], {**node.attrs, **fixed})

    return rule


def _identity(b: Rewriter, node: Node) -> Result:
    return node.inputs[0]


def _reshape(b: Rewriter, node: Node) -> Result:
    return view(b, node.inputs[0], node.outputs[0].type.shape)


def _view(b: Rewriter, node: Node) -> Result:
    shape = node.outputs[0].type.shape
    if same_shape(b.shape(node.inputs[0]), shape):
        return node.inputs[0]
    if node.attrs.get("size") != shape:
        return view(b, node.inputs[0], shape)
    return None


def _transpose(b: Rewriter, node: Node) -> Result:
    rank = len(node.outputs[0].type.shape)
    dims = list(range(rank))
    if rank >= 2:
        i, j = (int(node.attrs.get(n, d)) % rank for n, d in (("dim0", rank - 2), ("dim1", rank - 1)))
        dims[i], dims[j] = dims[j], dims[i]
    return permute(b, node.inputs[0], tuple(dims))


def _permute(b: Rewriter, node: Node) -> Result:
    dims = node.attrs["dims"]
    if any(d < 0 for d in dims) or dims == tuple(range(len(dims))):
        return permute(b, node.inputs[0], tuple(d % len(dims) for d in dims))
    return None


def _cast(b: Rewriter, node: Node) -> Result:
    to = node.outputs[0].type.dtype
    if b.type(node.inputs[0]).dtype == to:
        return node.inputs[0]
    if node.op != "aten._to_copy.default" or dict(node.attrs) != {"dtype": to}:
        return b.emit("aten._to_copy.default", node.inputs[:1], node.outputs[0].type, dtype=to)
    return None


def _expand(b: Rewriter, node: Node) -> Result:
    shape = node.outputs[0].type.shape
    if same_shape(b.shape(node.inputs[0]), shape):
        return node.inputs[0]
    if dict(node.attrs) != {"size": shape}:
        return b.emit("aten.expand.default", node.inputs[:1], node.outputs[0].type, size=shape)
    return None


def _slice(b: Rewriter, node: Node) -> Result:
    x, dim, shape = node.inputs[0], axis(b, node), b.shape(node.inputs[0])
    start, end, step = node.attrs.get("start", 0), node.attrs.get("end"), node.attrs.get("step", 1)
    size = shape[dim]
    if same_shape([size], [node.outputs[0].type.shape[dim]]) and step == 1:
        return x
    if isinstance(size, int) and isinstance(start, int) and (end is None or isinstance(end, int)):
        start = max(start + size, 0) if start < 0 else start
        end = size if end is None else max(end + size, 0) if end < 0 else min(end, size)
    elif end is None or (isinstance(end, int) and end >= 1 << 62):
        end = size
    attrs = {"dim": dim, "start": start, "end": end, "step": step}
    return None if dict(node.attrs) == attrs else b.emit(node.op, [x], node.outputs[0].type, **attrs)


def _slice_of_cat(b: Rewriter, node: Node) -> Result:
    """A slice that is just one of the tensors that were put one after the other."""
    cat = b.made(node.inputs[0], "aten.cat.default")
    if cat is None or cat.attrs["dim"] != node.attrs["dim"] or node.attrs["step"] != 1:
        return None
    start = 0
    for part in cat.inputs:
        size = b.shape(part)[node.attrs["dim"]]
        if not isinstance(size, int):
            return None
        if isinstance(node.attrs["end"], int) and start <= node.attrs["start"] and node.attrs["end"] <= start + size:
            if (node.attrs["start"], node.attrs["end"]) == (start, start + size):
                return part
            return cut(b, part, node.attrs["dim"], node.attrs["start"] - start, node.attrs["end"] - start)
        start += size
    return None


def _slice_scatter(b: Rewriter, node: Node) -> Result:
    """x with src at start:end is what comes before, src, and what comes after."""
    x, src = node.inputs
    dim, size = axis(b, node), b.shape(node.inputs[0])[axis(b, node)]
    start, end = node.attrs.get("start") or 0, node.attrs.get("end")
    if not isinstance(size, int):
        return b.decline(node, "slice_scatter over an axis of symbolic size")
    start, end = start % size if start < 0 else start, size if end is None else min(end % size if end < 0 else end, size)
    if (step := int(node.attrs.get("step", 1))) != 1:
        taken = {at: i for i, at in enumerate(range(start, end, step))}
        ones = [cut(b, src, dim, taken[at], taken[at] + 1) if at in taken else cut(b, x, dim, at, at + 1) for at in range(size)]
        return b.emit("aten.cat.default", ones, node.outputs[0].type, tensors=size, dim=dim)
    parts = [cut(b, x, dim, 0, start)] if start else []
    parts += [src, *([cut(b, x, dim, end, size)] if end < size else [])]
    return b.emit("aten.cat.default", parts, node.outputs[0].type, tensors=len(parts), dim=dim)


def _select_scatter(b: Rewriter, node: Node) -> Result:
    """x with src at one index of an axis."""
    x, src = node.inputs
    dim, shape = axis(b, node), b.shape(x)
    size, index = shape[dim], int(node.attrs["index"])
    if not isinstance(size, int):
        return b.decline(node, "select_scatter over an axis of symbolic size")
    index %= size
    parts = [cut(b, x, dim, 0, index)] if index else []
    parts += [view(b, src, (*shape[:dim], 1, *shape[dim + 1 :]))]
    parts += [cut(b, x, dim, index + 1, size)] if index + 1 < size else []
    return b.emit("aten.cat.default", parts, node.outputs[0].type, tensors=len(parts), dim=dim)


def _select_of_cat(b: Rewriter, node: Node) -> Result:
    """One index of tensors put one after the other along that axis, or of an axis that is repeated."""
    dim, index = node.attrs["dim"], node.attrs["index"]
    kind = node.outputs[0].type
    if (wide := b.made(node.inputs[0], "aten.expand.default")) is not None:
        source = b.shape(wide.inputs[0])
        at = dim - (len(b.shape(node.inputs[0])) - len(source))
        if at >= 0 and source[at] == 1:
            rest = view(b, wide.inputs[0], (*source[:at], *source[at + 1 :]))
            return rest if same_shape(b.shape(rest), kind.shape) else b.emit("aten.expand.default", [rest], kind, size=kind.shape)
        if at < 0:
            narrow = wide.inputs[0]
            return narrow if same_shape(source, kind.shape) else b.emit("aten.expand.default", [narrow], kind, size=kind.shape)
    cat = b.made(node.inputs[0], "aten.cat.default")
    if cat is None or cat.attrs["dim"] != dim or not isinstance(index, int):
        return None
    for part in cat.inputs:
        size = b.shape(part)[dim]
        if not isinstance(size, int):
            return None
        if index < size:
            return view(b, part, kind.shape) if size == 1 else b.emit(node.op, [part], kind, dim=dim, index=index)
        index -= size
    return None


def _cat(b: Rewriter, node: Node) -> Result:
    """One tensor is itself; a cat of a cat along the same axis is one cat."""
    if len(node.inputs) == 1:
        return node.inputs[0]
    inner = [b.made(x, "aten.cat.default") for x in node.inputs]
    if any(c and c.attrs["dim"] == node.attrs["dim"] for c in inner):
        parts = [p for c, x in zip(inner, node.inputs, strict=True) for p in (c.inputs if c and c.attrs["dim"] == node.attrs["dim"] else (x,))]
        return b.emit("aten.cat.default", parts, node.outputs[0].type, tensors=len(parts), dim=node.attrs["dim"])
    return None


def _cat_of_slices(b: Rewriter, node: Node) -> Result:
    """Neighbouring slices of one tensor, put together again."""
    parts = [b.made(x, "aten.slice.Tensor") for x in node.inputs]
    dim = node.attrs["dim"]
    if not all(p and p.attrs["dim"] == dim and p.attrs["step"] == 1 for p in parts):
        return None
    slices = [p for p in parts if p]
    adjacent = all(p.attrs["end"] == q.attrs["start"] for p, q in zip(slices, slices[1:], strict=False))
    if not adjacent or len({p.inputs[0] for p in slices}) != 1:
        return None
    attrs = {"dim": dim, "start": slices[0].attrs["start"], "end": slices[-1].attrs["end"], "step": 1}
    return b.emit("aten.slice.Tensor", [slices[0].inputs[0]], node.outputs[0].type, **attrs)


def _copy(b: Rewriter, node: Node) -> Result:
    """x overwritten with src is src, in x's shape and element type."""
    x, src = node.inputs
    kind = node.outputs[0].type
    if b.type(src).dtype != kind.dtype:
        src = b.emit("aten._to_copy.default", [src], TensorType(kind.dtype, b.shape(src)), dtype=kind.dtype)
    return src if same_shape(b.shape(src), kind.shape) else b.emit("aten.expand.default", [src], kind, size=kind.shape)


def cut(b: Rewriter, x: str, dim: int, start: int, end: int) -> str:
    """x[start:end] along one axis."""
    kind = b.type(x)
    shape = (*kind.shape[:dim], end - start, *kind.shape[dim + 1 :])
    return b.emit("aten.slice.Tensor", [x], TensorType(kind.dtype, shape), dim=dim, start=start, end=end, step=1)


def _split(b: Rewriter, node: Node) -> Result:
    dim, results, start = axis(b, node), [], 0
    for output in node.outputs:
        size = output.type.shape[dim]
        if not isinstance(size, int):
            return b.decline(node, "splits an axis of symbolic size")
        results.append(cut(b, node.inputs[0], dim, start, start + size))
        start += size
    return tuple(results)


def _unbind(b: Rewriter, node: Node) -> Result:
    dim = axis(b, node)
    return tuple(b.emit("aten.select.int", node.inputs, o.type, dim=dim, index=i) for i, o in enumerate(node.outputs))


def _stack(b: Rewriter, node: Node) -> Result:
    shape = node.outputs[0].type.shape
    dim = int(node.attrs.get("dim", 0)) % len(shape)
    one = (*shape[:dim], 1, *shape[dim + 1 :])
    parts = [view(b, x, one) for x in node.inputs]
    return b.emit("aten.cat.default", parts, node.outputs[0].type, tensors=len(parts), dim=dim)


def _full(value: Attr) -> Rule:
    def rule(b: Rewriter, node: Node) -> Result:
        kind = node.outputs[0].type
        fill = node.attrs.get("fill_value", node.attrs.get("s", 0)) if value is None else value
        attrs = {"size": kind.shape, "fill_value": fill, "dtype": kind.dtype}
        if node.op == "aten.full.default" and dict(node.attrs) == attrs:
            return None
        return b.emit("aten.full.default", [], kind, **attrs)

    return rule


def _arange(b: Rewriter, node: Node) -> Result:
    kind, a = node.outputs[0].type, node.attrs
    attrs = {"start": a.get("start", 0), "end": a["end"], "step": a.get("step", 1), "dtype": kind.dtype}
    if node.op == "aten.arange.start_step" and dict(node.attrs) == attrs:
        return None
    return b.emit("aten.arange.start_step", [], kind, **attrs)


def _masked_fill(b: Rewriter, node: Node) -> Result:
    x, mask = node.inputs[:2]
    if len(node.inputs) == 3:
        return b.emit("aten.where.self", [mask, node.inputs[2], x], node.outputs[0].type)
    return b.emit("aten.where.self", [mask, x], node.outputs[0].type, self=node.attrs["value"])


def _where_scalar(b: Rewriter, node: Node) -> Result:
    return b.emit_all("aten.where.self", node.inputs, [node.outputs[0].type], node.attrs)


def _reduce(op: str) -> Rule:
    """A reduction with its axes as a sorted list of non-negative numbers and `keepdim` stated."""

    def rule(b: Rewriter, node: Node) -> Result:
        rank = len(b.shape(node.inputs[0]))
        stated = node.attrs.get("dim")
        stated = tuple(range(rank)) if stated is None or stated == () else stated if isinstance(stated, tuple) else (stated,)
        attrs = {"dim": tuple(sorted(d % rank for d in stated)), "keepdim": bool(node.attrs.get("keepdim", False))}
        if node.op == op and dict(node.attrs) == attrs:
            return None
        x = node.inputs[0]
        if b.type(x).dtype != (to := node.outputs[0].type.dtype) and not op.startswith("aten.am"):
            x = b.emit("aten._to_copy.default", [x], TensorType(to, b.shape(x)), dtype=to)
        return b.emit(op, [x], node.outputs[0].type, **attrs)

    return rule


def _softmax(b: Rewriter, node: Node) -> Result:
    attrs = {"dim": axis(b, node, default=-1), "half_to_float": False}
    if node.op == "aten._softmax.default" and dict(node.attrs) == attrs:
        return None
    return b.emit("aten._softmax.default", node.inputs[:1], node.outputs[0].type, **attrs)


def _axis_op(**defaults: Attr) -> Rule:
    """An op whose `dim` becomes non-negative and whose other attributes are stated."""

    def rule(b: Rewriter, node: Node) -> Result:
        dim = int(node.attrs.get("dim", defaults.get("dim", -1))) % max(len(node.outputs[0].type.shape), 1)
        attrs = {**defaults, **node.attrs, "dim": dim}
        if node.op.startswith("aten.cumsum") or node.op.startswith("aten.gather"):
            attrs.pop("dtype", None), attrs.pop("sparse_grad", None)
        return None if dict(node.attrs) == attrs else b.emit_all(node.op, node.inputs, [o.type for o in node.outputs], attrs)

    return rule


def _repeat_interleave(b: Rewriter, node: Node) -> Result:
    """[..., n, ...] -> [..., n, 1, ...] -> [..., n, r, ...] -> [..., n * r, ...]"""
    x, shape = node.inputs[0], b.shape(node.inputs[0])
    repeats = node.attrs["repeats"]
    dim = axis(b, node)
    one = view(b, x, (*shape[: dim + 1], 1, *shape[dim + 1 :]))
    wide = (*shape[: dim + 1], repeats, *shape[dim + 1 :])
    spread = b.emit("aten.expand.default", [one], TensorType(b.type(x).dtype, wide), size=wide)
    return view(b, spread, node.outputs[0].type.shape)


def _max_dim(b: Rewriter, node: Node) -> Result:
    """max over an axis is the best one of topk."""
    x, dim = node.inputs[0], axis(b, node)
    shape = b.shape(x)
    one = (*shape[:dim], 1, *shape[dim + 1 :])
    kinds = (TensorType(b.type(x).dtype, one), TensorType("i64", one))
    attrs = {"k": 1, "dim": dim, "largest": not node.op.startswith("aten.min"), "sorted": True}
    results = b.emit_all("aten.topk.default", [x], kinds, attrs)
    return tuple(view(b, r, o.type.shape) for r, o in zip(results, node.outputs, strict=False))


def _binary(unit: Any) -> Rule:
    """An operation with a number that changes nothing disappears; `alpha` becomes a multiplication; scalar overloads go."""

    def rule(b: Rewriter, node: Node) -> Result:
        attrs, kind = dict(node.attrs), node.outputs[0].type
        alpha = attrs.pop("alpha", 1)
        if "other" in attrs and isinstance(attrs["other"], (int, float)):
            other = attrs["other"] * alpha
            same = b.type(node.inputs[0]) == kind and other == unit
            if same:
                return node.inputs[0]
            name = node.op.rsplit(".", 1)[0] + ".Tensor"
            if alpha != 1 or name != node.op:
                return b.emit(name, node.inputs, kind, other=other)
        elif alpha != 1:
            return b.emit(node.op, [node.inputs[0], number_op(b, "aten.mul.Tensor", node.inputs[1], alpha)], kind)
        return None

    return rule


def _with_full(b: Rewriter, node: Node) -> Result:
    """An operand that is one number everywhere, and does not make the result larger, becomes that number."""
    if len(node.inputs) != 2:
        return None
    commutes = node.op in ("aten.mul.Tensor", "aten.add.Tensor")
    for x, constant in (node.inputs, node.inputs[::-1])[: 1 + commutes]:
        full = b.made(constant, "aten.full.default")
        if full and isinstance(full.attrs["fill_value"], (int, float)) and b.type(x) == node.outputs[0].type:
            return b.emit(node.op, [x], node.outputs[0].type, other=full.attrs["fill_value"])
    return None


def _unary_power(exponent: float) -> Rule:
    def rule(b: Rewriter, node: Node) -> Result:
        return b.emit("aten.pow.Tensor_Scalar", node.inputs, node.outputs[0].type, exponent=exponent)

    return rule


def _pow(b: Rewriter, node: Node) -> Result:
    exponent = node.attrs.get("exponent")
    if exponent == 1:
        return node.inputs[0]
    for value, op in ((0.5, "aten.sqrt.default"), (-0.5, "aten.rsqrt.default")):
        if exponent == value:
            return b.emit(op, node.inputs, node.outputs[0].type)
    return None


def _rsub(b: Rewriter, node: Node) -> Result:
    """other - x"""
    kind = node.outputs[0].type
    if len(node.inputs) == 2:
        return b.emit("aten.sub.Tensor", node.inputs[::-1], kind)
    return number_op(b, "aten.add.Tensor", b.emit("aten.neg.default", node.inputs, kind), node.attrs["other"])


def _clamp(b: Rewriter, node: Node) -> Result:
    names = {"clamp_min": "min", "clamp_max": "max", "clamp": ""}
    name = names[node.op.split(".")[1]]
    attrs = {name: node.attrs[name]} if name and name in node.attrs else dict(node.attrs)
    return b.emit("aten.clamp.default", node.inputs, node.outputs[0].type, **attrs)


def _logical(name: str) -> Rule:
    def rule(b: Rewriter, node: Node) -> Result:
        if any(b.type(x).dtype != "bool" for x in node.inputs):
            return None
        return b.emit(f"aten.{name}.default", node.inputs, node.outputs[0].type)

    return rule


_DROPPED = ("clone", "alias", "detach", "contiguous", "lift_fresh_copy", "lift_fresh", "lift", "detach_copy", "alias_copy", "positive")
_VIEWS = (
    "reshape", "_unsafe_view", "view_copy", "_reshape_copy", "unsqueeze", "unsqueeze_copy", "squeeze", "squeeze.dim", "squeeze.dims",
    "squeeze_copy", "flatten.using_ints", "unflatten.int", "view_as", "ravel", "reshape_as",
)  # fmt: skip
_CASTS = ("_to_copy", "to.dtype", "to.device", "to.dtype_layout", "to.other", "type_as", "float", "_to_dtype")
_FULLS: dict[str, Attr] = {
    "full": None, "full_like": None, "new_full": None, "scalar_tensor": None, "zeros": 0, "zeros_like": 0, "new_zeros": 0,
    "ones": 1, "ones_like": 1, "new_ones": 1, "empty.memory_format": 0, "empty_like": 0, "new_empty": 0,
}  # fmt: skip


def _op(name: str) -> str:
    return f"aten.{name}" if "." in name else f"aten.{name}.default"


RULES: dict[str, tuple[Rule, ...]] = {
    **{_op(name): (_identity,) for name in _DROPPED},
    **{_op(name): (_identity,) for name in ("dropout", "feature_dropout", "alpha_dropout")},
    **{_op(name): (_reshape,) for name in _VIEWS},
    **{_op(name): (_cast,) for name in _CASTS},
    **{_op(name): (_full(value),) for name, value in _FULLS.items()},
    **{f"aten.arange.{name}": (_arange,) for name in ("default", "start", "start_step")},
    **{f"aten.{name}": (_transpose,) for name in ("transpose.int", "t.default", "transpose_copy.int", "numpy_T.default")},
    **{_op(name): (_expand,) for name in ("expand", "expand_copy", "expand_as", "broadcast_to")},
    **{f"aten.{name}": (_split,) for name in ("split.Tensor", "split.sizes", "split_with_sizes.default", "chunk.default")},
    "aten.view.default": (_view,),
    "aten.permute.default": (_permute,),
    "aten.slice.Tensor": (_slice, _slice_of_cat),
    "aten.slice_scatter.default": (_slice_scatter,),
    "aten.copy.default": (_copy,),
    "aten.slice_copy.Tensor": (_is("aten.slice.Tensor"),),
    "aten.select_copy.int": (_is("aten.select.int"),),
    "aten.unbind.int": (_unbind,),
    "aten.stack.default": (_stack,),
    "aten.cat.default": (_axis_op(dim=0), _cat, _cat_of_slices),
    "aten.concat.default": (_is("aten.cat.default"),),
    "aten.concatenate.default": (_is("aten.cat.default"),),
    "aten.select.int": (lambda b, node: _axis_select(b, node), _select_of_cat),
    "aten.select_scatter.default": (_select_scatter,),
    "aten.masked_fill.Scalar": (_masked_fill,),
    "aten.masked_fill.Tensor": (_masked_fill,),
    "aten.where.ScalarSelf": (_where_scalar,),
    "aten.where.ScalarOther": (_where_scalar,),
    "aten.where.Scalar": (_where_scalar,),
    **{f"aten.sum.{name}": (_reduce("aten.sum.dim_IntList"),) for name in ("default", "dim_IntList")},
    **{f"aten.mean.{name}": (_reduce("aten.mean.dim"),) for name in ("default", "dim")},
    **{f"aten.{name}.default": (_reduce(f"aten.{name}.default"),) for name in ("amax", "amin")},
    "aten.max.default": (_reduce("aten.amax.default"),),
    "aten.min.default": (_reduce("aten.amin.default"),),
    **{f"aten.{name}": (_softmax,) for name in ("softmax.int", "_softmax.default", "_safe_softmax.default")},
    "aten.topk.default": (_axis_op(largest=True, sorted=True),),
    "aten.sort.default": (_axis_op(descending=False),),
    "aten.sort.stable": (lambda b, n: b.emit_all("aten.sort.default", n.inputs, [o.type for o in n.outputs],
                                                 {"dim": n.attrs.get("dim", -1), "descending": n.attrs.get("descending", False)}),),
    "aten.cumsum.default": (_axis_op(),),
    "aten.gather.default": (_axis_op(),),
    "aten.repeat_interleave.self_int": (_repeat_interleave,),
    "aten.max.dim": (_max_dim,),
    "aten.min.dim": (_max_dim,),
    **{f"aten.{name}.{kind}": (_binary(unit), _with_full) for name, unit in (("mul", 1), ("div", 1), ("add", 0), ("sub", 0))
       for kind in ("Tensor", "Scalar")},
    "aten.rsub.Scalar": (_rsub,),
    "aten.rsub.Tensor": (_rsub,),
    "aten.square.default": (_unary_power(2),),
    "aten.reciprocal.default": (_unary_power(-1),),
    "aten.pow.Tensor_Scalar": (_pow,),
    "aten.clamp_min.default": (_clamp,),
    "aten.clamp_max.default": (_clamp,),
    **{f"aten.{prefix}_{name}.Tensor": (_logical(f"logical_{name}"),) for prefix in ("bitwise",) for name in ("and", "or", "xor")},
    **{f"aten.__{name}__.Tensor": (_logical(f"logical_{name}"),) for name in ("and", "or", "xor")},
    "aten.bitwise_not.default": (_logical("logical_not"),),
}  # fmt: skip


def _axis_select(b: Rewriter, node: Node) -> Result:
    """A negative axis or index becomes the same counted from the front."""
    dim, index = axis(b, node), node.attrs["index"]
    size = b.shape(node.inputs[0])[dim]
    if isinstance(index, int) and index < 0 and isinstance(size, int):
        index += size
    attrs = {"dim": dim, "index": index}
    return None if dict(node.attrs) == attrs else b.emit(node.op, node.inputs, node.outputs[0].type, **attrs)
