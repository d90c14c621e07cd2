"""The traced experts become `experts`: tokens as [B, T, D], the weights in one layout, their choice by a `router` if it is one.

%flat = aten.view.default(%x);  %w, %ids = (a few ATen ops of the router's logits)
%y: f32[B*T, D] = moec.experts.default(%flat, %ids, %w, @up, @down)
->  %w, %ids = router(%logits);  %y: f32[B, T, D] = experts(%x, %ids, %w, @up, @down)
"""

from __future__ import annotations

from moec.compiler.frontend.layout import Layout
from moec.compiler.frontend.rewrite import Result, Rewriter, Rule
from moec.compiler.frontend.rules.canonical import view
from moec.compiler.frontend.rules.params import as_param, relaid
from moec.compiler.frontend.rules.router import raise_router
from moec.compiler.ir import Node


def _experts(b: Rewriter, node: Node) -> Result:
    x, ids, weights, up, down, *biases = node.inputs
    attrs = dict(node.attrs)
    transposed, interleaved = bool(attrs.pop("transposed")), bool(attrs.pop("interleaved"))
    up = as_param(b, up, "gate_up_proj" if attrs["gated"] else "up_proj")
    down = as_param(b, down, "down_proj")
    relaid(b, up, Layout(transposed, interleaved))
    relaid(b, down, Layout(transposed))
    if biases and biases[0]:
        relaid(b, biases[0], Layout(interleaved=interleaved))
    if attrs["gated"]:
        del attrs["gated"]
    if not attrs["limit"]:
        del attrs["limit"]
    if (found := raise_router(b, node, ids, weights)) is not None:
        ids, weights = found
    kind, inner = b.type(x), b.made(x, "aten.view.default")
    if inner and len(b.shape(inner.inputs[0])) > len(kind.shape) and b.shape(inner.inputs[0])[-1] == kind.shape[-1]:
        x = inner.inputs[0]
        lead = b.shape(x)[:-1]
        ids, weights = (view(b, name, (*lead, b.shape(name)[-1])) for name in (ids, weights))
    result = b.emit("experts", [x, ids, weights, up, down, *biases], b.type(x), **attrs)
    return view(b, result, node.outputs[0].type.shape)


RULES: dict[str, tuple[Rule, ...]] = {"moec.experts.default": (_experts,)}
