"""One spelling for arithmetic, choices and reductions."""

from __future__ import annotations

from typing import Any

from moec.compiler.frontend.rewrite import Result, Rewriter, Rule
from moec.compiler.frontend.rules.canonical import axis, number_op, view
from moec.compiler.ir import Node, TensorType


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


def _clamp_tensor(b: Rewriter, node: Node) -> Result:
    """Bounds that are tensors are a maximum and a minimum."""
    result, kind = node.inputs[0], node.outputs[0].type
    for bound, op in zip(node.inputs[1:], ("maximum", "minimum"), strict=False):
        if bound:
            result = b.emit(f"aten.{op}.default", [result, bound], kind)
    return result


def _logical(name: str) -> Rule:
    def rule(b: Rewriter, node: Node) -> Result:
        if any(b.type(x).dtype != "bool" for x in node.inputs):
            return None
        return b.emit(f"aten.{name}.default", node.inputs, node.outputs[0].type)

    return rule


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


def _max_dim(b: Rewriter, node: Node) -> Result:
    """max over an axis is the best one of topk."""
    x, dim = node.inputs[0], axis(b, node)
    shape = b.shape(x)
    one = (*shape[:dim], 1, *shape[dim + 1 :])
    kinds = (TensorType(b.type(x).dtype, one), TensorType("i64", one))
    attrs = {"k": 1, "dim": dim, "largest": not node.op.startswith("aten.min"), "sorted": True}
    results = b.emit_all("aten.topk.default", [x], kinds, attrs)
    return tuple(view(b, r, o.type.shape) for r, o in zip(results, node.outputs, strict=False))


def _masked_fill(b: Rewriter, node: Node) -> Result:
    x, mask = node.inputs[:2]
    if len(node.inputs) == 3:
        return b.emit("aten.where.self", [mask, node.inputs[2], x], node.outputs[0].type)
    return b.emit("aten.where.self", [mask, x], node.outputs[0].type, self=node.attrs["value"])


def _where_scalar(b: Rewriter, node: Node) -> Result:
    return b.emit_all("aten.where.self", node.inputs, [node.outputs[0].type], node.attrs)


def _log_sigmoid(b: Rewriter, node: Node) -> Result:
    """log(sigmoid(x)) = -softplus(-x)"""
    kind = node.outputs[0].type
    minus = b.emit("aten.neg.default", node.inputs, kind)
    return b.emit("aten.neg.default", [b.emit("aten.softplus.default", [minus], kind)], kind)


def _reduced(b: Rewriter, node: Node, op: str, x: str) -> str:
    """x reduced over the axes of a node, which stay with size one."""
    shape = b.shape(x)
    stated = node.attrs.get("dim")
    dims = tuple(
        sorted(d % len(shape) for d in (stated if isinstance(stated, tuple) else range(len(shape)) if stated is None else (stated,)))
    )
    kind = TensorType(b.type(x).dtype, tuple(1 if i in dims else d for i, d in enumerate(shape)))
    return b.emit(op, [x], kind, dim=dims, keepdim=True)


def _logsumexp(b: Rewriter, node: Node) -> Result:
    """log(sum(exp(x - m))) + m with m the greatest x."""
    x, kind = node.inputs[0], b.type(node.inputs[0])
    greatest = _reduced(b, node, "aten.amax.default", x)
    powers = b.emit("aten.exp.default", [b.emit("aten.sub.Tensor", [x, greatest], kind)], kind)
    total = _reduced(b, node, "aten.sum.dim_IntList", powers)
    return view(
        b,
        b.emit("aten.add.Tensor", [b.emit("aten.log.default", [total], b.type(total)), greatest], b.type(total)),
        node.outputs[0].type.shape,
    )


def _vector_norm(b: Rewriter, node: Node) -> Result:
    """The square root of the sum of squares; other norms stay."""
    if node.attrs.get("ord", 2) != 2 or b.type(node.inputs[0]).dtype != node.outputs[0].type.dtype:
        return None
    squares = b.emit("aten.mul.Tensor", [node.inputs[0]] * 2, b.type(node.inputs[0]))
    total = _reduced(b, node, "aten.sum.dim_IntList", squares)
    return view(b, b.emit("aten.sqrt.default", [total], b.type(total)), node.outputs[0].type.shape)


def _pad(b: Rewriter, node: Node) -> Result:
    if node.attrs.get("mode", "constant") != "constant":
        return None
    value = node.attrs.get("value")
    return b.emit("aten.constant_pad_nd.default", node.inputs, node.outputs[0].type, pad=node.attrs["pad"], value=value or 0)


RULES: dict[str, tuple[Rule, ...]] = {
    "aten.log_sigmoid.default": (_log_sigmoid,),
    "aten.logsumexp.default": (_logsumexp,),
    "aten.linalg_vector_norm.default": (_vector_norm,),
    "aten.pad.default": (_pad,),
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
    "aten.max.dim": (_max_dim,),
    "aten.min.dim": (_max_dim,),
    **{f"aten.{name}.{kind}": (_binary(unit), _with_full) for name, unit in (("mul", 1), ("div", 1), ("add", 0), ("sub", 0))
       for kind in ("Tensor", "Scalar")},
    "aten.rsub.Scalar": (_rsub,),
    "aten.rsub.Tensor": (_rsub,),
    "aten.square.default": (_unary_power(2),),
    "aten.reciprocal.default": (_unary_power(-1),),
    "aten.pow.Tensor_Scalar": (_pow,),
    "aten.clamp.Tensor": (_clamp_tensor,),
    "aten.clamp_min.default": (_clamp,),
    "aten.clamp_max.default": (_clamp,),
    **{f"aten.{prefix}_{name}.Tensor": (_logical(f"logical_{name}"),) for prefix in ("bitwise",) for name in ("and", "or", "xor")},
    **{f"aten.__{name}__.Tensor": (_logical(f"logical_{name}"),) for name in ("and", "or", "xor")},
    "aten.bitwise_not.default": (_logical("logical_not"),),
}  # fmt: skip
