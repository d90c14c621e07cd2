"""Which linear layers the TVM backend for GPUs takes together, and with what in front of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moec.compiler.backends.tvm.cuda import CudaPlatform
from moec.compiler.backends.tvm.fusion import Fusion, disjoint
from moec.compiler.backends.tvm.fusions.projections import Projections, Several, match, match_up_to
from moec.compiler.backends.tvm.storage import plan_storage
from moec.compiler.ir import Graph
from moec.compiler.text import parse_graph
from moec.runtime.tvm_device import Gpu
from moec.runtime.tvm_functions import Function
from moec.targets import get_target
from moec.targets.kernels.cuda.layout import FragmentLayout
from moec.targets.kernels.cuda.matrices import Projection
from moec.targets.kernels.cuda.projections import ProjectionsSpec
from tests.compiler.backends.test_tvm import with_format
from tests.compiler.backends.test_tvm_cuda import emulated, whole
from tests.compiler.backends.tvm_model import Compiled
from tests.graphs import random_weights
from tests.targets.kernels.emulator import needs_emulator

__all__ = ["emulated", "whole"]

BLOCK = """
graph block {layers=1, context_length=64, vocab_size=40} {
  input %x: f32[B, T, 16]
  input %y: f32[B, T, 16]
  param @norm: f32[16] as f32
  param @shift: f32[16] as f32
  param @gate: f32[6, 16] as bf16
  param @bias: f32[6] as f32
  param @left: f32[24, 16] as int4_g16
  param @right: f32[24, 16] as int4_g16
  param @last: f32[40, 16] as bf16
  %h: f32[B, T, 16] = aten.add.Tensor(%x, %y)
  %n: f32[B, T, 16] = rms_norm(%h, @norm) {eps=1e-05}
  %logits: f32[B, T, 6] = linear(%n, @gate, @bias)
  %w: f32[B, T, 2], %i: i64[B, T, 2] = router(%logits) {top_k=2, score="softmax"}
  %a: f32[B, T, 24] = linear(%n, @left)
  %b: f32[B, T, 24] = linear(%n, @right)
  %m: f32[B, T, 16] = layer_norm(%h, @norm, @shift) {eps=1e-05}
  %out: f32[B, T, 40] = linear(%m, @last)
  return %out, %w, %a, %b
}
"""

DENSE = """
graph dense {layers=1, context_length=64, vocab_size=40} {
  input %ids: i64[B, T]
  input %positions: i64[B, T]
  param @embed: f32[40, 16] as f32
  param @wq: f32[16, 16] as f32
  param @wk: f32[16, 16] as f32
  param @wv: f32[16, 16] as f32
  param @wo: f32[16, 16] as f32
  param @gate: f32[48, 16] as f32
  param @up: f32[48, 16] as f32
  param @down: f32[16, 48] as f32
  param @n1: f32[16] as f32
  param @n2: f32[16] as f32
  param @b2: f32[16] as f32
  param @n3: f32[16] as f32
  %h: f32[B, T, 16] = embedding(%ids, @embed)
  %x: f32[B, T, 16] = rms_norm(%h, @n1) {eps=1e-05}
  %q: f32[B, T, 16] = linear(%x, @wq)
  %k: f32[B, T, 16] = linear(%x, @wk)
  %v: f32[B, T, 16] = linear(%x, @wv)
  %qh: f32[B, T, 2, 8] = aten.view.default(%q) {size=["B", "T", 2, 8]}
  %kh: f32[B, T, 2, 8] = aten.view.default(%k) {size=["B", "T", 2, 8]}
  %vh: f32[B, T, 2, 8] = aten.view.default(%v) {size=["B", "T", 2, 8]}
  %a: f32[B, T, 2, 8] = attention(%qh, %kh, %vh) {scale=0.35}
  %b: f32[B, T, 16] = aten.view.default(%a) {size=["B", "T", 16]}
  %c: f32[B, T, 16] = linear(%b, @wo)
  %h1: f32[B, T, 16] = aten.add.Tensor(%h, %c)
  %y: f32[B, T, 16] = layer_norm(%h1, @n2, @b2) {eps=1e-05}
  %g: f32[B, T, 48] = linear(%y, @gate)
  %u: f32[B, T, 48] = linear(%y, @up)
  %s: f32[B, T, 48] = aten.silu.default(%g)
  %m: f32[B, T, 48] = aten.mul.Tensor(%s, %u)
  %d: f32[B, T, 16] = linear(%m, @down)
  %h2: f32[B, T, 16] = aten.add.Tensor(%h1, %d)
  %z: f32[B, T, 16] = rms_norm(%h2, @n3) {eps=1e-05, offset=1.0}
  %out: f32[B, T, 40] = linear(%z, @embed)
  return %out
}
"""


def found_in(graph: Graph, tokens: int = 1) -> list[Projections]:
    platform = CudaPlatform(get_target("h100-sxm"))
    return match(graph, plan_storage(graph, platform), platform.gpu, tokens)


def found() -> list[Projections]:
    return found_in(parse_graph(BLOCK))


def names(fusion: Fusion) -> list[str]:
    return [node.name for node in fusion.nodes]


def test_choices_go_from_many_nodes_to_few() -> None:
    assert [names(fusion) for fusion in found()] == [
        ["h", "n", "logits", "a", "b"],
        ["n", "logits", "a", "b"],
        ["logits", "a", "b"],
        ["a", "b"],
        ["m", "out"],
    ]
    assert [names(fusion) for fusion in disjoint(found())] == [["h", "n", "logits", "a", "b"], ["m", "out"]]


def test_what_the_kernel_is_told() -> None:
    first, *_, last = found()
    assert first.spec.norm is not None
    assert (first.spec.norm.residual, first.spec.norm.bias, first.spec.written) == (True, False, False)
    assert [(matrix.layout.format, matrix.bias) for matrix in first.spec.matrices] == [
        ("bf16", True),
        ("int4_g16", False),
        ("int4_g16", False),
    ]
    assert last.spec.norm is not None
    assert (last.spec.norm.center, last.spec.norm.bias, last.spec.norm.residual) == (True, True, False)


def test_a_norm_that_others_read_is_written() -> None:
    graph = parse_graph(BLOCK.replace("return %out", "return %n, %out"))
    first = found_in(graph)[0]
    assert first.spec.written


def test_several_tokens_are_matched_where_all_blocks_run_at_once() -> None:
    graph = parse_graph(BLOCK)
    assert [names(fusion) for fusion in found_in(graph, 8)] == [names(fusion) for fusion in found()]
    assert {fusion.spec.tokens for fusion in found_in(graph, 8)} == {8}
    rows = 40 * 16 * 132  # of a lm head of so many tiles a multiprocessor
    large = parse_graph(BLOCK.replace("f32[40, 16]", f"f32[{rows}, 16]").replace("T, 40]", f"T, {rows}]"))
    assert ["m", "out"] in [names(fusion) for fusion in found_in(large)]
    assert [names(fusion) for fusion in disjoint(found_in(large, 8))] == [["h", "n", "logits", "a", "b"]]
    platform = CudaPlatform(get_target("h100-sxm"))
    for function in (Function("forward48", most=48), Function("forward")):
        assert not any(isinstance(found, Projections) for found in platform.fusions(graph, plan_storage(graph, platform), function))


def test_any_number_of_tokens_up_to_so_many() -> None:
    """The linear layers of a value alone; one in front of a router may go with that. A single one is nothing to fuse."""
    graph, platform = parse_graph(BLOCK), CudaPlatform(get_target("h100-sxm"))
    storage = plan_storage(graph, platform)
    found = match_up_to(graph, storage, platform.gpu, 48)
    assert [names(fusion) for fusion in found] == [["logits", "a", "b"], ["a", "b"]]
    assert [(matrix.layout.format, matrix.bias) for matrix in found[0].spec.matrices] == [
        ("bf16", True),
        ("int4_g16", False),
        ("int4_g16", False),
    ]
    assert match_up_to(graph, storage, platform.gpu, 1024) == []

    def several(function: Function) -> list[list[str]]:
        fusions = platform.fusions(graph, storage, function)
        return [names(fusion) for fusion in fusions if isinstance(fusion, Several)]

    assert several(Function("forward48", most=48)) == several(Function("forward192", most=192)) == [["a", "b"]]  # the router has the other
    assert several(Function("forward")) == several(Function("decode8", 8, 8, 8)) == []


@pytest.mark.parametrize(("target", "tokens"), [("h100-sxm", 8), ("l4", 4)])
def test_what_suits_a_gpu(target: str, tokens: int) -> None:
    """The most tokens for which q, k and v of 2048 rows fit; one always does."""
    gpu = CudaPlatform(get_target(target)).gpu

    def suits(tokens: int, k: int = 2048, rows: int = 2048) -> bool:
        matrices = [Projection(FragmentLayout(rows, k, "int4_g128"))] * 3
        return ProjectionsSpec.of(matrices, gpu.multiprocessors, tokens=tokens).suits(gpu)

    assert [suits(t) for t in (1, 2, 4, 8)] == [t <= tokens for t in (1, 2, 4, 8)]
    assert suits(1, 1 << 16)
    assert not suits(8, 1 << 14)
    assert [suits(t, rows=1 << 16) for t in (1, 2, 4, 8)] == [True, True, False, False]


@needs_emulator
@pytest.mark.parametrize("name", ["int4_g32", "bf16"])
def test_a_model_on_the_emulated_gpu(name: str, emulated: Gpu, tmp_path: Path) -> None:
    """Tokens of several sequences in one call, which is filled up, and one sequence's."""
    graph = with_format(parse_graph(DENSE), name)
    assert [names(fusion) for fusion in disjoint(found_in(graph, 4))] == [
        ["x", "q", "k", "v"],
        ["h1", "y", "g", "u"],
        ["h2", "z", "out"],
    ]
    model = Compiled(graph, random_weights(graph), tmp_path, "h100-sxm", emulated, (2, 4, 8, 30))
    rng, executor = np.random.default_rng(1), model.executor
    texts = [rng.integers(0, executor.vocab_size, 30) for _ in range(3)]
    expected = [model.expected(text) for text in texts]
    sequences = [executor.add() for _ in texts]
    executor.forward([(s, text[:9]) for s, text in zip(sequences, texts, strict=True)])
    ends = [9, 9, 9]
    for steps in ([1, 1, 1], [1, 2, 1], [3, 1, 3], [1, 0, 1], [0, 0, 8]):
        called = [i for i in range(3) if steps[i]]
        found = executor.forward([(sequences[i], texts[i][ends[i] : ends[i] + steps[i]]) for i in called])
        ends = [end + count for end, count in zip(ends, steps, strict=True)]
        np.testing.assert_allclose(found, [expected[i][ends[i] - 1] for i in called], atol=1e-4)


@needs_emulator
@pytest.mark.parametrize("name", ["int4_g16", "bf16"])
def test_a_model_with_many_tokens_on_the_emulated_gpu(name: str, whole: Gpu, tmp_path: Path) -> None:
    """A batch of sequences, some with several tokens; k and v have another format than q."""
    graph = with_format(parse_graph(DENSE), name)
    graph = graph.with_params([replace(graph.params[other], format="int8_g16") for other in ("wk", "wv")])
    platform = CudaPlatform(get_target("h100-sxm"))
    together = match_up_to(graph, plan_storage(graph, platform), platform.gpu, 48)
    assert [names(fusion) for fusion in together] == [["q", "k", "v"], ["g", "u"]]
    model = Compiled(graph, random_weights(graph), tmp_path, "h100-sxm", whole, (30,))
    assert b"linear_tokens_kernel" in (tmp_path / "lib.so").read_bytes()
    rng, executor = np.random.default_rng(2), model.executor
    texts = [rng.integers(0, executor.vocab_size, 24) for _ in range(6)]
    sequences, ends = [executor.add() for _ in texts], [0] * 6
    for first, others in ((20, 1), (1, 2), (1, 3)):
        steps = [first, *[others] * 5]
        found = executor.forward([(s, t[e : e + n]) for s, t, e, n in zip(sequences, texts, ends, steps, strict=True)])
        ends = [end + n for end, n in zip(ends, steps, strict=True)]
        expected = [model.expected(text[:end])[-1] for text, end in zip(texts, ends, strict=True)]
        np.testing.assert_allclose(found, expected, atol=1e-4)
