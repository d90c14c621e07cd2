"""Neighbouring ops that one operator of ONNX Runtime computes together."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest

from moec.compiler.text import parse_graph
from tests.compiler.backends.test_onnx_graphs import EMBED, HEAD, TAIL, agree
from tests.graphs import random_weights
from tests.onnx_model import build


def layer(fmt: str, *, norm: bool, other: bool, context: int = 64) -> str:
    """Attention with q, k and v from one value; `other`: k is turned by angles that are not its own twice over."""
    lines = [
        HEAD.replace("context_length=64", f"context_length={context}"),
        *(f"  param @{name}: f32[{rows}, 32] as {fmt}" for name, rows in (("q", 32), ("k", 16), ("v", 16), ("o", 32))),
        "  param @qn: f32[16] as bf16\n  param @freq: f32[8] as f32",
        EMBED,
        "  %k0: f32[B, T, 16] = linear(%h, @k)\n  %q0: f32[B, T, 32] = linear(%h, @q)\n  %v0: f32[B, T, 16] = linear(%h, @v)",
        '  %q1: f32[B, T, 2, 16] = aten.view.default(%q0) {size=["B", "T", 2, 16]}',
        "  %q2: f32[B, T, 2, 16] = rms_norm(%q1, @qn) {eps=1e-06, offset=1.0}" if norm else "",
        '  %k1: f32[B, T, 1, 16] = aten.view.default(%k0) {size=["B", "T", 1, 16]}',
        '  %v1: f32[B, T, 1, 16] = aten.view.default(%v0) {size=["B", "T", 1, 16]}',
        '  %p: f32[B, T] = aten._to_copy.default(%positions) {dtype="f32"}',
        '  %p1: f32[B, T, 1] = aten.view.default(%p) {size=["B", "T", 1]}',
        "  %angle: f32[B, T, 8] = aten.mul.Tensor(%p1, @freq)",
        "  %both: f32[B, T, 16] = aten.cat.default(%angle, %angle) {tensors=2, dim=2}",
        "  %cos: f32[B, T, 16] = aten.cos.default(%both)\n  %sin: f32[B, T, 16] = aten.sin.default(%both)",
        f"  %qr: f32[B, T, 2, 16] = rope({'%q2' if norm else '%q1'}, %cos, %sin)",
        f"  %kr: f32[B, T, 1, 16] = rope(%k1, {'%sin, %cos' if other else '%cos, %sin'})",
        "  %a: f32[B, T, 2, 16] = attention(%qr, %kr, %v1) {scale=0.3}",
        '  %a1: f32[B, T, 32] = aten.view.default(%a) {size=["B", "T", 32]}',
        "  %o1: f32[B, T, 32] = linear(%a1, @o)\n  %y: f32[B, T, 32] = aten.add.Tensor(%h, %o1)",
        TAIL,
    ]
    return "\n".join(lines)


def operators(text: str, folder: Path) -> Counter[str]:
    built = build(graph := parse_graph(text), random_weights(graph), folder)
    return Counter(n.op_type for n in onnx.load(built.folder / "model.onnx", load_external_data=False).graph.node)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("fmt", ["int4_g32", "int4_g16_asym", "int8_g32", "f32"])
def test_attention_layer(fmt: str, norm: bool, tmp_path: Path) -> None:
    text = layer(fmt, norm=norm, other=False)
    agree(text, portable=False)
    ops = operators(text, tmp_path)
    assert ops["MatMulNBits"] == (0 if fmt == "f32" else 2)
    assert ops["RotaryEmbedding"] == 0


def test_attention_that_cannot_turn(tmp_path: Path) -> None:
    text = layer("int4_g32", norm=True, other=True)
    agree(text, portable=False)
    assert operators(text, tmp_path)["RotaryEmbedding"] == 2


def test_long_contexts_get_no_table_and_no_full_logits(tmp_path: Path) -> None:
    text = layer("int4_g32", norm=True, other=False, context=1 << 20)
    agree(text, portable=False)
    assert operators(text, tmp_path)["RotaryEmbedding"] == 2
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    (attention,) = (n for n in model.graph.node if n.op_type == "GroupQueryAttention")
    assert len(attention.input) == 7


def test_long_prompts_in_parts(tmp_path: Path) -> None:
    graph = parse_graph(layer("int4_g32", norm=True, other=False, context=2048))
    built = build(graph, random_weights(graph), tmp_path)
    executor, tokens = built.executor(), np.random.default_rng(0).integers(0, 24, 1100)
    reference = built.reference(tokens)
    for all_logits in (True, False):
        found = executor.forward([(executor.add(), tokens)], all_logits=all_logits)
        expected = reference if all_logits else reference[-1:]
        np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(reference).max())
