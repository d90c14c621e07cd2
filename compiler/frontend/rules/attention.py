"""The traced attention becomes `attention`, which has tokens before heads.

%y = moec.attention.default(%q, %k, %v)  with q [B, H, T, d]    ->   %y = attention(permute(%q), permute(%k), permute(%v))
"""

from __future__ import annotations

from moec.compiler.frontend.rewrite import Result, Rewriter, Rule
from moec.compiler.frontend.rules.canonical import permute
from moec.compiler.ir import Node


def _attention(b: Rewriter, node: Node) -> Result:
    q, k, v, *sinks = node.inputs
    inputs = [*(permute(b, x, (0, 2, 1, 3)) for x in (q, k, v)), *sinks]
    defaults = {"window": 0, "chunk": 0, "softcap": 0.0}
    attrs = {name: value for name, value in node.attrs.items() if value != defaults.get(name)}
    return b.emit("attention", inputs, node.outputs[0].type, **attrs)


def _linear_attention(b: Rewriter, node: Node) -> Result:
    return b.emit("linear_attention", node.inputs, node.outputs[0].type)


RULES: dict[str, tuple[Rule, ...]] = {
    "moec.attention.default": (_attention,),
    "moec.linear_attention.default": (_linear_attention,),
}
