"""Products with a weight become `linear`, lookups in one `embedding`; every other product is `matmul`."""

from __future__ import annotations

from moec.compiler.frontend.rewrite import Result, Rewriter, Rule
from moec.compiler.frontend.rules.canonical import number_op, permute
from moec.compiler.ir import Node, TensorType


def _linear(b: Rewriter, node: Node) -> Result:
    """x @ w^T + bias with w a parameter [N, K]."""
    x, weight, *bias = node.inputs
    kind = node.outputs[0].type
    if b.is_param(weight) and all(b.is_param(c) for c in bias) and len(b.shape(weight)) == 2:
        return b.emit("linear", node.inputs, kind)
    product = b.emit("aten.matmul.default", [x, permute(b, weight, (1, 0))], kind)
    return b.emit("aten.add.Tensor", [product, *bias], kind) if bias else product


def _matmul(b: Rewriter, node: Node) -> Result:
    """x @ permute(w) with w a parameter [N, K]."""
    x, y = node.inputs
    turned = b.made(y, "aten.permute.default")
    if turned and turned.attrs["dims"] == (1, 0) and b.is_param(turned.inputs[0]):
        return b.emit("linear", [x, turned.inputs[0]], node.outputs[0].type)
    if node.op != "aten.matmul.default":
        return b.emit("aten.matmul.default", node.inputs, node.outputs[0].type)
    return None


def _addmm(b: Rewriter, node: Node) -> Result:
    """beta * c + alpha * (x @ y)"""
    c, x, y = node.inputs
    kind = node.outputs[0].type
    if node.attrs.get("beta", 1) != 1 or node.attrs.get("alpha", 1) != 1:
        product = number_op(b, "aten.mul.Tensor", b.emit("aten.matmul.default", [x, y], kind), node.attrs.get("alpha", 1))
        scaled = b.emit("aten.mul.Tensor", [c], b.type(c), other=node.attrs.get("beta", 1))
        return b.emit("aten.add.Tensor", [scaled, product], kind)
    turned = b.made(y, "aten.permute.default")
    if turned and turned.attrs["dims"] == (1, 0) and b.is_param(turned.inputs[0]) and b.is_param(c) and len(b.shape(c)) == 1:
        return b.emit("linear", [x, turned.inputs[0], c], kind)
    return b.emit("aten.add.Tensor", [b.emit("aten.matmul.default", [x, y], kind), c], kind)


def _embedding(b: Rewriter, node: Node) -> Result:
    """aten has (weight, ids), the semantic op (ids, weight)."""
    weight, ids = node.inputs[:2]
    return b.emit("embedding", [ids, weight], node.outputs[0].type) if b.is_param(weight) else None


def _bias(b: Rewriter, node: Node) -> Result:
    """linear(x, w) + bias -> linear(x, w, bias)"""
    if len(node.inputs) != 2:
        return None
    for x, c in (node.inputs, node.inputs[::-1]):
        made = b.made(x, "linear")
        if made and len(made.inputs) == 2 and b.is_param(c) and len(b.shape(c)) == 1 and b.shape(c)[0] == b.shape(x)[-1]:
            return b.emit("linear", [*made.inputs, c], TensorType(b.type(x).dtype, b.shape(x)))
    return None


RULES: dict[str, tuple[Rule, ...]] = {
    "aten.linear.default": (_linear,),
    "aten.matmul.default": (_matmul,),
    "aten.bmm.default": (_matmul,),
    "aten.mm.default": (_matmul,),
    "aten.addmm.default": (_addmm,),
    "aten.add.Tensor": (_bias,),
    "aten.embedding.default": (_embedding,),
}
