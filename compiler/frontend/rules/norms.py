"""Normalisations written out become one op.

%m = aten.mean.dim(aten.pow.Tensor_Scalar(%x) {exponent=2}) {dim=[-1], keepdim=true}
%n = aten.mul.Tensor(%x, aten.rsqrt.default(aten.add.Tensor(%m) {other=eps}))         ->   %n = rms_norm(%x) {eps=eps}
%y = aten.mul.Tensor(%n, @w)                                                          ->   %y = rms_norm(%x, @w) {eps=eps}
"""

from __future__ import annotations

from moec.compiler.frontend.rewrite import Result, Rewriter, Rule, both_orders
from moec.compiler.ir import Node


def _inverse_rms(b: Rewriter, name: str) -> tuple[str, float] | None:
    """(x, eps) where the value is 1 / sqrt(mean(x^2, last axis, kept) + eps)."""
    rsqrt = b.made(name, "aten.rsqrt.default")
    if rsqrt is None:
        power = b.made(name, "aten.pow.Tensor_Scalar")
        if power is None or power.attrs["exponent"] != -1 or (rsqrt := b.made(power.inputs[0], "aten.sqrt.default")) is None:
            return None
    return _mean_square(b, rsqrt.inputs[0])


def _mean_square(b: Rewriter, name: str) -> tuple[str, float] | None:
    eps, total = 0.0, b.made(name, "aten.add.Tensor")
    if total is not None and isinstance(total.attrs.get("other"), (int, float)):
        eps, name = float(total.attrs["other"]), total.inputs[0]
    mean = b.made(name, "aten.mean.dim")
    if mean is None or not mean.attrs["keepdim"] or mean.attrs["dim"] != (len(b.shape(mean.inputs[0])) - 1,):
        return None
    square = b.made(mean.inputs[0], "aten.pow.Tensor_Scalar")
    if square is not None and square.attrs["exponent"] == 2:
        return square.inputs[0], eps
    product = b.made(mean.inputs[0], "aten.mul.Tensor")
    if product is not None and len(product.inputs) == 2 and product.inputs[0] == product.inputs[1]:
        return product.inputs[0], eps
    return None


def _normalised(b: Rewriter, node: Node) -> Result:
    """x * rsqrt(mean(x^2) + eps)"""
    for x, scale in both_orders(node):
        found = _inverse_rms(b, scale)
        if found and found[0] == x:
            return b.emit("rms_norm", [x], node.outputs[0].type, eps=found[1])
    return None


def _divided(b: Rewriter, node: Node) -> Result:
    """x / sqrt(mean(x^2) + eps)"""
    root = b.made(node.inputs[1], "aten.sqrt.default") if len(node.inputs) == 2 else None
    found = _mean_square(b, root.inputs[0]) if root else None
    return b.emit("rms_norm", [node.inputs[0]], node.outputs[0].type, eps=found[1]) if found and found[0] == node.inputs[0] else None


def _weighted(b: Rewriter, node: Node) -> Result:
    """rms_norm(x) * w and rms_norm(x) * (c + w)"""
    for x, weight in both_orders(node):
        norm = b.made(x, "rms_norm")
        if norm is None or len(norm.inputs) != 1 or b.shape(weight) != b.shape(x)[-1:]:
            continue
        shifted = b.made(weight, "aten.add.Tensor")
        if b.is_param(weight):
            return b.emit("rms_norm", [norm.inputs[0], weight], node.outputs[0].type, **norm.attrs)
        if shifted and b.is_param(shifted.inputs[0]) and isinstance(shifted.attrs.get("other"), (int, float)):
            offset = float(shifted.attrs["other"])
            return b.emit("rms_norm", [norm.inputs[0], shifted.inputs[0]], node.outputs[0].type, **norm.attrs, offset=offset)
        b.decline(node, "rms_norm: the factor is neither a parameter nor a parameter plus a number")
    return None


def _one_axis(b: Rewriter, node: Node) -> bool:
    return len(node.attrs["normalized_shape"]) == 1


def _rms_norm(b: Rewriter, node: Node) -> Result:
    if not _one_axis(b, node) or not all(b.is_param(w) for w in node.inputs[1:]):
        return b.decline(node, "rms_norm over several axes, or with a computed weight")
    eps = node.attrs.get("eps")
    return b.emit("rms_norm", node.inputs, node.outputs[0].type, eps=1.1920928955078125e-07 if eps is None else float(eps))


def _layer_norm(b: Rewriter, node: Node) -> Result:
    if not _one_axis(b, node) or not all(b.is_param(w) for w in node.inputs[1:] if w):
        return b.decline(node, "layer_norm over several axes, or with a computed weight")
    return b.emit("layer_norm", node.inputs, node.outputs[0].type, eps=float(node.attrs.get("eps", 1e-5)))


RULES: dict[str, tuple[Rule, ...]] = {
    "aten.mul.Tensor": (_normalised, _weighted),
    "aten.div.Tensor": (_divided,),
    "aten.rms_norm.default": (_rms_norm,),
    "aten.layer_norm.default": (_layer_norm,),
}
