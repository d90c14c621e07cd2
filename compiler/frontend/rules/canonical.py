"""One spelling for each ATen operation.

Squeeze, unsqueeze, flatten and reshape become `view` with the full shape, transposes become `permute` with non-negative axes, the
many constructors become `full` and `arange`, splits become slices, and operations that only concern memory disappear.
"""

from __future__ import annotations

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


def same_op(op: str, **fixed: Attr) -> Rule:
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


def axis_op(**defaults: Attr) -> Rule:
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
    "aten.view.default": (_view,),
    "aten.permute.default": (_permute,),
    "aten.slice_copy.Tensor": (same_op("aten.slice.Tensor"),),
    "aten.select_copy.int": (same_op("aten.select.int"),),
    "aten.concat.default": (same_op("aten.cat.default"),),
    "aten.concatenate.default": (same_op("aten.cat.default"),),
    "aten.topk.default": (axis_op(largest=True, sorted=True),),
    "aten.sort.default": (axis_op(descending=False),),
    "aten.sort.stable": (lambda b, n: b.emit_all("aten.sort.default", n.inputs, [o.type for o in n.outputs],
                                                 {"dim": n.attrs.get("dim", -1), "descending": n.attrs.get("descending", False)}),),
    "aten.cumsum.default": (axis_op(),),
    "aten.gather.default": (axis_op(),),
    "aten.repeat_interleave.self_int": (_repeat_interleave,),
}  # fmt: skip
