"""Attention of few tokens with norms and rope in front of it: what is found in a graph, and that a model computes the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moec.compiler.backends.tvm.cuda import CudaPlatform
from moec.compiler.backends.tvm.fusions.attention import AttentionStep, match
from moec.compiler.backends.tvm.storage import plan_storage
from moec.compiler.ir import Graph
from moec.compiler.text import parse_graph
from moec.runtime.tvm_device import Gpu
from moec.runtime.tvm_functions import Function
from moec.targets import get_target
from tests.compiler.backends.test_tvm import with_format
from tests.compiler.backends.test_tvm_cuda import emulated, whole
from tests.compiler.backends.tvm_model import Compiled
from tests.graphs import random_weights
from tests.targets.kernels.emulator import needs_emulator

__all__ = ["emulated", "whole"]

GPU = CudaPlatform(get_target("h100-sxm")).gpu

LAYERS = """
graph small {layers=2, context_length=96, vocab_size=40} {
  input %ids: i64[B, T]
  input %positions: i64[B, T]
  param @embed: f32[40, 16] as f32
  param @frequencies: f32[4] as f32
  param @q1: f32[16, 16] as f32
  param @k1: f32[16, 16] as f32
  param @v1: f32[16, 16] as f32
  param @o1: f32[16, 16] as f32
  param @qn1: f32[16] as f32
  param @kn1: f32[16] as f32
  param @q2: f32[32, 16] as f32
  param @k2: f32[16, 16] as f32
  param @v2: f32[16, 16] as f32
  param @o2: f32[16, 32] as f32
  param @qn2: f32[8] as f32
  %p: f32[B, T] = aten._to_copy.default(%positions) {dtype="f32"}
  %p1: f32[B, T, 1] = aten.view.default(%p) {size=["B", "T", 1]}
  %half: f32[B, T, 4] = aten.mul.Tensor(%p1, @frequencies)
  %angles: f32[B, T, 8] = aten.cat.default(%half, %half) {tensors=2, dim=2}
  %cos: f32[B, T, 8] = aten.cos.default(%angles)
  %sin: f32[B, T, 8] = aten.sin.default(%angles)
  %h: f32[B, T, 16] = embedding(%ids, @embed)
  %qa: f32[B, T, 16] = linear(%h, @q1)
  %ka: f32[B, T, 16] = linear(%h, @k1)
  %va: f32[B, T, 16] = linear(%h, @v1)
  %qb: f32[B, T, 16] = rms_norm(%qa, @qn1) {eps=1e-05}
  %kb: f32[B, T, 16] = rms_norm(%ka, @kn1) {eps=1e-05, offset=1.0}
  %qc: f32[B, T, 2, 8] = aten.view.default(%qb) {size=["B", "T", 2, 8]}
  %kc: f32[B, T, 2, 8] = aten.view.default(%kb) {size=["B", "T", 2, 8]}
  %vc: f32[B, T, 2, 8] = aten.view.default(%va) {size=["B", "T", 2, 8]}
  %qd: f32[B, T, 2, 8] = rope(%qc, %cos, %sin)
  %kd: f32[B, T, 2, 8] = rope(%kc, %cos, %sin)
  %a: f32[B, T, 2, 8] = attention(%qd, %kd, %vc) {scale=0.35}
  %b: f32[B, T, 16] = aten.view.default(%a) {size=["B", "T", 16]}
  %c: f32[B, T, 16] = linear(%b, @o1)
  %h1: f32[B, T, 16] = aten.add.Tensor(%h, %c)
  %qe: f32[B, T, 32] = linear(%h1, @q2)
  %ke: f32[B, T, 16] = linear(%h1, @k2)
  %ve: f32[B, T, 16] = linear(%h1, @v2)
  %qf: f32[B, T, 4, 8] = aten.view.default(%qe) {size=["B", "T", 4, 8]}
  %kf: f32[B, T, 2, 8] = aten.view.default(%ke) {size=["B", "T", 2, 8]}
  %vf: f32[B, T, 2, 8] = aten.view.default(%ve) {size=["B", "T", 2, 8]}
  %qg: f32[B, T, 4, 8] = rms_norm(%qf, @qn2) {eps=1e-06}
  %kg: f32[B, T, 2, 8] = rms_norm(%kf) {eps=1e-06}
  %qh: f32[B, T, 4, 8] = rope(%qg, %cos, %sin)
  %kh: f32[B, T, 2, 8] = rope(%kg, %cos, %sin)
  %d: f32[B, T, 4, 8] = attention(%qh, %kh, %vf) {scale=0.35, window=20}
  %e: f32[B, T, 32] = aten.view.default(%d) {size=["B", "T", 32]}
  %f: f32[B, T, 16] = linear(%e, @o2)
  %h2: f32[B, T, 16] = aten.add.Tensor(%h1, %f)
  %out: f32[B, T, 40] = linear(%h2, @embed)
  return %out
}
"""


def changed(*edits: tuple[str, str]) -> Graph:
    text = LAYERS
    for old, new in edits:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return parse_graph(text)


def names(step: AttentionStep) -> set[str]:
    return {node.name for node in step.nodes}


def test_norms_and_rope_are_found() -> None:
    first, second = match(changed(), {}, GPU, 1)
    assert names(first) == {"qb", "qc", "qd", "kb", "kc", "kd", "a"}
    assert (first.q.source, first.k.source) == ("qa", "ka")
    assert first.spec.rope
    assert first.spec.q_norm is not None
    assert first.spec.k_norm is not None
    assert (first.spec.q_norm.size, first.spec.q_norm.groups, first.spec.k_norm.offset) == (16, 1, 1.0)
    assert names(second) == {"qf", "qg", "qh", "kf", "kg", "kh", "d"}
    assert (second.q.source, second.k.source) == ("qe", "ke")
    assert second.spec.q_norm is not None
    assert second.spec.k_norm is not None
    assert (second.spec.q_norm.size, second.spec.q_norm.groups, second.spec.k_norm.weight) == (8, 4, False)


def test_what_others_read_is_left_out() -> None:
    first, _ = match(changed(("linear(%b, @o1)", "linear(%qb, @o1)")), {}, GPU, 1)
    assert (first.q.source, first.q.norm, first.k.source) == ("qb", None, "ka")
    assert first.spec.rope
    assert first.spec.q_norm is None
    returned, _ = match(changed(("return %out", "return %out, %kb")), {}, GPU, 1)
    assert (returned.q.source, returned.k.source, returned.k.norm) == ("qa", "kb", None)


def test_another_kind_of_norm_is_left_out() -> None:
    norm = "%qb: f32[B, T, 16] = rms_norm(%qa, @qn1) {eps=1e-05}"
    first, _ = match(changed((norm, norm.replace("rms_norm", "layer_norm"))), {}, GPU, 1)
    assert (first.q.source, first.spec.q_norm, first.k.source) == ("qb", None, "ka")


def test_rope_of_one_of_them_is_left_out() -> None:
    edits = ("attention(%qd, %kd, %vc)", "attention(%qd, %kc, %vc)"), ("  %kd: f32[B, T, 2, 8] = rope(%kc, %cos, %sin)\n", "")
    first, _ = match(changed(*edits), {}, GPU, 1)
    assert names(first) == {"a"}
    assert (first.q.source, first.k.source, first.spec.rope) == ("qd", "kc", False)


@needs_emulator
@pytest.mark.parametrize(("dtype", "atol"), [("float32", 1e-4), ("bfloat16", 1e-3)])
def test_a_model_on_the_emulated_gpu(dtype: str, atol: float, emulated: Gpu, tmp_path: Path) -> None:
    graph = with_format(changed(), "bf16")
    model = Compiled(graph, random_weights(graph), tmp_path, "h100-sxm", emulated, (1, 59), dtype)
    ids = np.random.default_rng(0).integers(0, model.executor.vocab_size, 70)
    expected = model.expected(ids)
    sequence = model.executor.add()
    found = [model.executor.forward([(sequence, ids[:1])])[0]]
    model.executor.forward([(sequence, ids[1:60])])
    found += [model.executor.forward([(sequence, ids[i : i + 1])])[0] for i in range(60, 70)]
    np.testing.assert_allclose(found, expected[[0, *range(60, 70)]], atol=atol)


def wide() -> Graph:
    """The same with half as many heads of twice the size, which the kernel for blocks of several tokens takes."""
    text = LAYERS
    for old, new in (("2, 8]", "1, 16]"), ("4, 8]", "2, 16]"), ("[B, T, 8]", "[B, T, 16]"), ("[B, T, 4]", "[B, T, 8]")):
        text = text.replace(old, new)
    return parse_graph(text.replace("@frequencies: f32[4]", "@frequencies: f32[8]").replace("@qn2: f32[8]", "@qn2: f32[16]"))


def test_which_functions_have_it() -> None:
    platform = CudaPlatform(get_target("h100-sxm"))

    def count(graph: Graph, function: Function) -> int:
        fused = platform.fusions(graph, plan_storage(graph, platform), function)
        return len([found for found in fused if isinstance(found, AttentionStep)])

    several = [Function("decode4", 4, 4, 4), Function("forward48", most=48), Function("forward")]
    assert [count(wide(), function) for function in several] == [2, 2, 2]
    assert [count(changed(), function) for function in several] == [2, 0, 0]  # heads of 8 are too small for products


@needs_emulator
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_batches_on_the_emulated_gpu(dtype: str, whole: Gpu, tmp_path: Path) -> None:
    graph, atol = with_format(wide(), "bf16"), 1e-4 if dtype == "float32" else 1e-3
    model = Compiled(graph, random_weights(graph), tmp_path, "h100-sxm", whole, (2, 4, 8, 40), dtype)
    assert {"decode2", "decode4", "decode8", "forward64"} == set(model.section["functions"])
    rng = np.random.default_rng(1)
    streams = [rng.integers(0, model.executor.vocab_size, 90) for _ in range(6)]
    expected, done = [model.expected(ids) for ids in streams], [0] * len(streams)
    handles = [model.executor.add() for _ in streams]
    calls = [
        [3, 0, 0, 0, 0, 0],  # a prompt, filled up to 4
        [0, 20, 17, 1, 0, 0],  # prompts of several blocks, and one token
        [1, 1, 0, 0, 0, 0],
        [2, 1, 4, 1, 0, 0],
        [1, 1, 1, 0, 0, 0],  # a batch that is filled up
        [1, 1, 1, 1, 0, 5],  # fills repeat the last of several tokens: 9 in all take another function
        [0, 1, 1, 0, 2, 2],  # and 6 are filled up to 8
        [30, 1, 0, 1, 1, 1],
        [1, 1, 1, 1, 1, 1],
        [0, 0, 0, 0, 0, 2],
        [33, 17, 0, 1, 1, 0],
    ]
    for counts in calls:
        steps, rows = [], []
        for i, count in enumerate(counts):
            if count:
                steps.append((handles[i], streams[i][done[i] : done[i] + count]))
                done[i] += count
                rows.append(expected[i][done[i] - 1])
        np.testing.assert_allclose(model.executor.forward(steps), np.stack(rows), atol=atol, err_msg=f"{counts}")
