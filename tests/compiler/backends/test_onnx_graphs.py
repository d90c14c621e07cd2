"""Random small graphs: ONNX Runtime gives what the interpreter gives, step by step as well as at once."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.compiler.text import parse_graph
from moec.compiler.verify import verify
from tests.graphs import random_weights
from tests.onnx_model import build

HEAD = """
graph g {context_length=64, vocab_size=24} {
  input %ids: i64[B, T]
  input %positions: i64[B, T]
  param @embed: f32[24, 32] as f32
"""
TAIL = """
  %logits: f32[B, T, 24] = linear(%y, @embed)
  return %logits
}
"""
EMBED = "  %h: f32[B, T, 32] = embedding(%ids, @embed)\n"


def agree(text: str, *, portable: bool, std: float = 0.3, tolerance: float = 2e-5) -> None:
    """Feed 11 tokens as 5, 1, 1 and 4; compare with the whole sequence at once."""
    graph = parse_graph(text)
    verify(graph)
    tokens = np.random.default_rng(0).integers(0, 24, 11)
    with tempfile.TemporaryDirectory() as folder:
        built = build(graph, random_weights(graph, std=std), Path(folder), portable=portable)
        executor = built.executor()
        sequence = executor.add()
        logits = [executor.forward([(sequence, tokens[a:b])], all_logits=True) for a, b in ((0, 5), (5, 6), (6, 7), (7, 11))]
    reference = built.reference(tokens)
    np.testing.assert_allclose(np.concatenate(logits), reference, atol=tolerance * np.abs(reference).max())


@st.composite
def routers(draw: st.DrawFn) -> tuple[str, bool]:
    """Attributes of a router of 8 experts, and whether it has a bias."""
    top_k = draw(st.integers(1, 4))
    score = draw(st.sampled_from(["softmax", "sigmoid", "softmax_topk", "identity"]))
    attrs = [f"top_k={top_k}", f'score="{score}"']
    if draw(st.booleans()):
        attrs.append("normalize=true")
    if draw(st.booleans()):
        attrs.append("scale=2.5")
    if draw(st.booleans()) and top_k <= 4:
        attrs += ["groups=4", "top_groups=2", f'group_score="{draw(st.sampled_from(["max", "top2"]))}"']
    return ", ".join(attrs), draw(st.booleans())


@st.composite
def moes(draw: st.DrawFn) -> str:
    """A graph with one layer of experts."""
    router, bias = draw(routers())
    gated = draw(st.booleans())
    kinds = ["silu", "gelu", "relu"] + (["swiglu_oai"] if gated else ["gelu_tanh", "relu2", "identity"])
    attrs = [f'activation="{draw(st.sampled_from(kinds))}"'] + ([] if gated else ["gated=false"])
    if gated and draw(st.booleans()):
        attrs.append("limit=1.5")
    f = draw(st.sampled_from([16, 24, 32]))
    rows = 2 * f if gated else f
    biases = draw(st.booleans())
    fmt = draw(
        st.sampled_from(["f32", "bf16", "f16", "int4_g32", "int4_g16_asym", "int3_channel", "int3_g32_asym", "int8_g32", "int5_channel"])
    )
    lines = [
        HEAD,
        "  param @gate: f32[8, 32] as f32",
        f"  param @up: f32[8, {rows}, 32] as {fmt}",
        f"  param @down: f32[8, 32, {f}] as {fmt}",
        "  param @bias: f32[8] as f32" if bias else "",
        f"  param @up_bias: f32[8, {rows}] as f32\n  param @down_bias: f32[8, 32] as bf16" if biases else "",
        EMBED,
        "  %scores: f32[B, T, 8] = linear(%h, @gate)",
        f"  %w: f32[B, T, {router[6]}], %i: i64[B, T, {router[6]}] = router(%scores{', @bias' if bias else ''}) {{{router}}}",
        f"  %e: f32[B, T, 32] = experts(%h, %i, %w, @up, @down{', @up_bias, @down_bias' if biases else ''}) {{{', '.join(attrs)}}}",
        "  %y: f32[B, T, 32] = aten.add.Tensor(%h, %e)",
        TAIL,
    ]
    return "\n".join(lines)


@settings(max_examples=40, deadline=None)
@given(moes(), st.booleans())
def test_experts(text: str, portable: bool) -> None:
    agree(text, portable=portable)


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_bias_changes_the_choice_of_a_normalised_softmax(top_k: int) -> None:
    lines = [
        HEAD,
        "  param @gate: f32[8, 32] as f32\n  param @up: f32[8, 32, 32] as int4_g32\n  param @down: f32[8, 32, 16] as int4_g32",
        "  param @bias: f32[8] as f32",
        EMBED,
        "  %scores: f32[B, T, 8] = linear(%h, @gate)",
        f"  %w: f32[B, T, {top_k}], %i: i64[B, T, {top_k}] = router(%scores, @bias) {{top_k={top_k}, normalize=true}}",
        '  %e: f32[B, T, 32] = experts(%h, %i, %w, @up, @down) {activation="silu"}',
        "  %y: f32[B, T, 32] = aten.add.Tensor(%h, %e)",
        TAIL,
    ]
    agree("\n".join(lines), portable=False)


@st.composite
def attentions(draw: st.DrawFn) -> str:
    """A graph with one attention."""
    heads, groups = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2]))
    d, dv = draw(st.sampled_from([8, 12, 16])), draw(st.sampled_from([8, 16, 20]))
    attrs = ["scale=0.3"]
    if draw(st.booleans()):
        attrs.append(f"window={draw(st.integers(1, 6))}")
    elif draw(st.booleans()):
        attrs.append(f"chunk={draw(st.integers(2, 6))}")
    if draw(st.booleans()):
        attrs.append("softcap=3.0")
    rope, sinks = draw(st.booleans()), draw(st.booleans())
    q, k, v = heads * groups * d, heads * d, heads * dv
    turned = "r" if rope else ""
    lines = [
        HEAD,
        f"  param @q: f32[{q}, 32] as f32\n  param @k: f32[{k}, 32] as bf16\n  param @v: f32[{v}, 32] as int4_g32",
        f"  param @o: f32[32, {heads * groups * dv}] as f32",
        f"  param @freq: f32[{d // 2}] as f32" if rope else "",
        f"  param @sinks: f32[{heads * groups}] as f32" if sinks else "",
        EMBED,
        f"  %q0: f32[B, T, {q}] = linear(%h, @q)\n  %k0: f32[B, T, {k}] = linear(%h, @k)\n  %v0: f32[B, T, {v}] = linear(%h, @v)",
        f'  %q1: f32[B, T, {heads * groups}, {d}] = aten.view.default(%q0) {{size=["B", "T", {heads * groups}, {d}]}}',
        f'  %k1: f32[B, T, {heads}, {d}] = aten.view.default(%k0) {{size=["B", "T", {heads}, {d}]}}',
        f'  %v1: f32[B, T, {heads}, {dv}] = aten.view.default(%v0) {{size=["B", "T", {heads}, {dv}]}}',
    ]
    if rope:
        pair = "%angle, %angle" if draw(st.booleans()) else "%angle, %twice"
        lines += [
            '  %p: f32[B, T] = aten._to_copy.default(%positions) {dtype="f32"}',
            '  %p1: f32[B, T, 1] = aten.view.default(%p) {size=["B", "T", 1]}',
            f"  %angle: f32[B, T, {d // 2}] = aten.mul.Tensor(%p1, @freq)",
            f"  %twice: f32[B, T, {d // 2}] = aten.mul.Tensor(%angle) {{other=2.0}}",
            f"  %both: f32[B, T, {d}] = aten.cat.default({pair}) {{tensors=2, dim=2}}",
            f"  %cos: f32[B, T, {d}] = aten.cos.default(%both)\n  %sin: f32[B, T, {d}] = aten.sin.default(%both)",
            f"  %q1r: f32[B, T, {heads * groups}, {d}] = rope(%q1, %cos, %sin)",
            f"  %k1r: f32[B, T, {heads}, {d}] = rope(%k1, %cos, %sin)",
        ]
    lines += [
        (
            f"  %a: f32[B, T, {heads * groups}, {dv}] = attention(%q1{turned}, %k1{turned}, %v1{', @sinks' if sinks else ''})"
            f" {{{', '.join(attrs)}}}"
        ),
        f'  %a1: f32[B, T, {heads * groups * dv}] = aten.view.default(%a) {{size=["B", "T", {heads * groups * dv}]}}',
        "  %o1: f32[B, T, 32] = linear(%a1, @o)\n  %y: f32[B, T, 32] = aten.add.Tensor(%h, %o1)",
        TAIL,
    ]
    return "\n".join(lines)


@settings(max_examples=40, deadline=None)
@given(attentions(), st.booleans())
def test_attention(text: str, portable: bool) -> None:
    agree(text, portable=portable)


FORMATS = [
    "f32",
    "bf16",
    "f16",
    "int4_g32",
    "int4_channel_asym",
    "int8_g64",
    "int8_g32_asym",
    "int2_g32",
    "int3_g64_asym",
    "int6_g40",
    "ternary_g32",
    "ternary_g40",
    "binary_channel",
]


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("k", [64, 100])
@pytest.mark.parametrize("fmt", FORMATS)
def test_linear_and_tied_embedding(fmt: str, k: int, portable: bool) -> None:
    agree(
        f"""
graph g {{context_length=64, vocab_size=24}} {{
  input %ids: i64[B, T]
  param @embed: f32[24, {k}] as {fmt}
  param @a: f32[{k}, {k}] as {fmt}
  param @bias: f32[{k}] as bf16
  param @norm: f32[{k}] as bf16
  %h: f32[B, T, {k}] = embedding(%ids, @embed)
  %a1: f32[B, T, {k}] = linear(%h, @a, @bias)
  %s: f32[B, T, {k}] = aten.add.Tensor(%h, %a1)
  %n: f32[B, T, {k}] = rms_norm(%s, @norm) {{eps=1e-06, offset=1.0}}
  %m: f32[B, T, {k}] = layer_norm(%n, @norm, @bias) {{eps=1e-06}}
  %y: f32[B, T, {k}] = aten.add.Tensor(%s, %m)
  %logits: f32[B, T, 24] = linear(%y, @embed)
  return %logits
}}""",
        portable=portable,
    )
