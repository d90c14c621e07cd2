"""How experts are chosen and skipped through ONNX Runtime, against the interpreter."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.compiler.text import parse_graph
from tests.compiler.backends.test_onnx_graphs import EMBED, HEAD, TAIL, agree
from tests.graphs import random_weights
from tests.onnx_model import build

FORMATS = st.sampled_from(["f32", "bf16", "int4_g32", "int8_g32"])


def moe(routing: str, ids: str, weights: str, fmt: str) -> str:
    """A layer of 8 experts of which a token has 3, with lines between router and experts."""
    return "\n".join(
        [
            HEAD,
            "  param @gate: f32[8, 32] as f32",
            f"  param @up: f32[8, 64, 32] as {fmt}\n  param @down: f32[8, 32, 32] as {fmt}",
            EMBED,
            "  %scores: f32[B, T, 8] = linear(%h, @gate)",
            routing,
            f'  %e: f32[B, T, 32] = experts(%h, {ids}, {weights}, @up, @down) {{activation="silu"}}',
            "  %y: f32[B, T, 32] = aten.add.Tensor(%h, %e)",
            TAIL,
        ]
    )


ROUTER = '  %w: f32[B, T, 3], %i: i64[B, T, 3] = router(%scores) {top_k=3, score="softmax", normalize=true}\n'


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from([0.0, 0.3, 0.7, 1.0]), st.sampled_from([1.0, 0.4, 0.7]), st.booleans(), st.booleans(), FORMATS, st.booleans()
)  # fmt: skip
def test_skip(ratio: float, top_p: float, counts: bool, normalize: bool, fmt: str, portable: bool) -> None:
    lines = ROUTER
    if counts:  # from below zero to above K
        lines += "  %c: f32[B, T, 1] = aten.sum.dim_IntList(%scores) {dim=[-1], keepdim=true}\n"
        lines += '  %n: i64[B, T, 1] = aten._to_copy.default(%c) {dtype="i64"}\n'
    attrs = f"experts=8, ratio={ratio}, top_p={top_p}, normalize={str(normalize).lower()}"
    lines += f"  %v: f32[B, T, 3], %j: i64[B, T, 3] = skip(%w, %i{', %n' if counts else ''}) {{{attrs}}}"
    agree(moe(lines, "%j", "%v", fmt), portable=portable)


@settings(max_examples=8, deadline=None)
@given(FORMATS, st.booleans(), st.integers(-5, 8))
def test_ids_of_no_expert_are_skipped(fmt: str, portable: bool, shift: int) -> None:
    lines = ROUTER + "\n".join(
        [
            f"  %j: i64[B, T, 3] = aten.add.Tensor(%i) {{other={shift}}}",
            '  %f: f32[B, T, 3] = aten._to_copy.default(%j) {dtype="f32"}',
            "  %g: f32[B, T, 3] = aten.neg.default(%f)",
            "  %r: f32[B, T, 3] = aten.add.Tensor(%g) {other=7.5}",
            "  %v: f32[B, T, 3] = aten.sqrt.default(%r)",  # NaN above 7, and no weight at all below 0
        ]
    )
    agree(moe(lines, "%j", "%v", fmt), portable=portable)


@pytest.mark.parametrize(
    "router", ['score="softmax", normalize=true', 'score="softmax"', 'score="sigmoid", normalize=true, scale=2.5', 'score="softmax_topk"']
)
@pytest.mark.parametrize("fmt", ["f32", "int4_g32"])
def test_operators_choose_for_themselves(router: str, fmt: str, tmp_path: Path) -> None:
    line = f"  %w: f32[B, T, 3], %i: i64[B, T, 3] = router(%scores) {{top_k=3, {router}}}"
    text = moe(line, "%i", "%w", fmt)
    agree(text, portable=False)
    built = build(graph := parse_graph(text), random_weights(graph), tmp_path)
    ops = Counter(n.op_type for n in onnx.load(built.folder / "model.onnx", load_external_data=False).graph.node)
    own = fmt == "int4_g32" or router in ('score="softmax", normalize=true', 'score="softmax_topk"')
    assert ops["TopK"] == ops["ScatterElements"] == (0 if own else 1)
    assert ops["Where"] == 0


def test_results_that_something_else_reads_are_computed() -> None:
    line = ROUTER + "  %t: f32[B, T, 1] = aten.amax.default(%w) {dim=[-1], keepdim=true}\n  %k: f32[B, T, 32] = aten.mul.Tensor(%h, %t)"
    text = moe(line, "%i", "%w", "int4_g32").replace("aten.add.Tensor(%h, %e)", "aten.add.Tensor(%k, %e)")
    agree(text, portable=False)
