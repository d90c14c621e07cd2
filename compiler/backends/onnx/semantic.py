"""The remaining semantic ops in ONNX: embedding, norms, rotary position embedding."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moec.compiler.backends.onnx.emit import CONTRIB
from moec.compiler.backends.onnx.fusion import equal_halves
from moec.compiler.backends.onnx.layout import IntLayout
from moec.compiler.ir import Graph, Node

if TYPE_CHECKING:
    from moec.compiler.backends.onnx.lower import Lowering


def lower_embedding(low: Lowering, node: Node) -> str:
    """The `embedding` op: rows are looked up as they are stored and widened afterwards."""
    ids, weight = low.value(node.inputs[0]), node.inputs[1]
    if weight not in low.graph.params:
        return low.e.op("Gather", low.value(weight), ids, axis=0)
    layout = low.weights.layout(weight)
    if isinstance(layout, IntLayout):
        return low.weights.rows(weight, ids)
    table = low.e.stored(weight, "weight", layout.format, layout.shape)
    rows = low.e.op("Gather", table, ids, axis=0, stem=node.name)
    return rows if layout.format == "f32" else low.e.op("Cast", rows, to=1)


def lower_rms_norm(low: Lowering, node: Node) -> str:
    """The `rms_norm` op; together with the addition before it where only the sum is needed besides."""
    e, x = low.e, node.inputs[0]
    weight, eps = _norm_weight(low, node), float(node.attrs["eps"])
    added = low.pending.pop(x, None)
    if added is None:
        value = low.value(x)
        if (half := low.half_of(value)) is None:
            return e.op("RMSNormalization", value, weight, axis=-1, epsilon=eps, stem=node.name)
        return low.widen(e.op("RMSNormalization", half, low.narrow(weight), axis=-1, epsilon=eps, stem=node.name))
    result, total = e.name(node.name), e.name(x)
    e.named("SkipSimplifiedLayerNormalization", (*added, weight), (result, "", "", total), CONTRIB, epsilon=eps)
    low.set_value(x, total)
    return result


def _norm_weight(low: Lowering, node: Node) -> str:
    size = low.shape(node.inputs[0])[-1]
    assert isinstance(size, int)
    if len(node.inputs) < 2 or not node.inputs[1]:
        return low.e.const(np.ones(size, np.float32))
    weight = low.value(node.inputs[1])
    if offset := float(node.attrs.get("offset", 0.0)):
        weight = low.e.op("Add", weight, low.number(offset, "f32"))
    factor = low.fusion.factors.get(node.name)
    return weight if factor is None else low.e.op("Mul", weight, low.number(factor, "f32"))


def fused_addition(low: Lowering, node: Node) -> bool:
    """Whether an addition is left to the norm that reads its result (SkipSimplifiedLayerNormalization gives both)."""
    users = low.graph.users.get(node.name, ())
    kinds = [low.graph.type_of(name) for name in node.inputs if name]
    return (
        not low.portable
        and node.op == "aten.add.Tensor"
        and len(kinds) == 2
        and all(k == node.outputs[0].type and k.dtype == "f32" and len(k.shape) == 3 for k in kinds)
        and bool(users)
        and users[0].op == "rms_norm"
        and users[0].inputs[0] == node.name
        and _axis_param(low.graph, users[0])
    )


def _axis_param(graph: Graph, norm: Node) -> bool:
    return len(norm.inputs) > 1 and norm.inputs[1] in graph.params


def lower_layer_norm(low: Lowering, node: Node) -> str:
    """The `layer_norm` op."""
    size = low.shape(node.inputs[0])[-1]
    assert isinstance(size, int)
    weight, bias = (low.value(n) if n else "" for n in (*node.inputs[1:3], "", "")[:2])
    weight = weight or low.e.const(np.ones(size, np.float32))
    return low.e.op("LayerNormalization", low.value(node.inputs[0]), weight, bias, axis=-1, epsilon=float(node.attrs["eps"]))


def lower_rope(low: Lowering, node: Node) -> str:
    """The `rope` op: RotaryEmbedding where both halves of a token's angles are known to be equal, else elementwise.

    Nothing where attention does it (see `fusion`).
    """
    if node.name in low.fusion.turned:
        low.set_flat(node.name, low.flat(node.inputs[0]))
        return ""
    e, (x, cos, sin) = low.e, node.inputs
    heads, size = low.shape(x)[2:]
    assert isinstance(heads, int)
    assert isinstance(size, int)
    if equal_halves(low.graph, cos) and equal_halves(low.graph, sin) and low.shape(cos) == (*low.shape(x)[:2], size):
        half = [e.op("Slice", low.value(c), e.const([0]), e.const([size // 2]), e.const([2])) for c in (cos, sin)]
        low.set_flat(node.name, e.op("RotaryEmbedding", low.flat(x), *half, num_heads=heads))
        return ""
    lower, upper = (e.op("Slice", low.value(x), e.const([a]), e.const([b]), e.const([3])) for a, b in ((0, size // 2), (size // 2, size)))
    turned = e.op("Concat", e.op("Neg", upper), lower, axis=3)
    wide = [e.op("Unsqueeze", low.value(c), e.const([2])) for c in (cos, sin)]
    return e.op("Add", e.op("Mul", low.value(x), wide[0]), e.op("Mul", turned, wide[1]))
