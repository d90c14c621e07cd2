"""Routing as one kernel: which nodes it takes, and that a model with it gives the interpreter's logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moec.compiler.backends.tvm.cuda import CudaKernels, CudaPlatform
from moec.compiler.backends.tvm.fusions import routing
from moec.compiler.backends.tvm.platform import Functions
from moec.compiler.backends.tvm.storage import plan_storage
from moec.compiler.ir import Graph
from moec.compiler.text import parse_graph, print_graph
from moec.runtime.tvm_device import Gpu
from moec.targets import get_target
from moec.targets.kernels.cuda.layout import FragmentLayout
from moec.targets.kernels.cuda.matrices import Projection
from moec.targets.kernels.cuda.routing_step import RoutingSpec
from moec.targets.kernels.specs import RouterSpec
from tests.compiler.backends.test_tvm import with_format
from tests.compiler.backends.test_tvm_cuda import emulated, whole
from tests.compiler.backends.tvm_model import Compiled
from tests.graphs import MOE, random_weights
from tests.targets.kernels.emulator import needs_emulator

__all__ = ["emulated", "whole"]

NORM = "  %x: f32[B, T, 16] = rms_norm(%h1, @norm.weight) {eps=1e-05}\n"
SKIP = "  %w: f32[B, T, 2], %i: i64[B, T, 2] = skip(%w0, %i0) {experts=6, ratio=0.7, normalize=true}\n"


def model(norm: str = NORM, router: str = "%logits", attrs: str = 'score="softmax", normalize=true', skip: bool = False) -> Graph:
    """The small model with a normalisation in front of its router, and perhaps more."""
    text = MOE.replace("[6, 24, 16]", "[6, 32, 16]").replace("[6, 16, 12]", "[6, 16, 16]")
    text = text.replace('router(%logits) {top_k=2, score="softmax", normalize=true}', f"router({router}) {{top_k=2, {attrs}}}")
    text = text.replace("  %logits: f32", norm + "  %logits: f32")
    if norm:
        text = text.replace("linear(%h1, @layers.0.gate", "linear(%x, @layers.0.gate").replace("experts(%h1,", "experts(%x,")
    if "@choice" in router:
        text = text.replace("  param @norm.w", "  param @choice: f32[6] as f32\n  param @norm.w")
    if skip:
        text = text.replace("  %w: f32[B, T, 2], %i:", "  %w0: f32[B, T, 2], %i0:").replace("  %e: f32", SKIP + "  %e: f32")
    return with_format(parse_graph(text), "bf16")


def matched(graph: Graph, tokens: int = 1) -> list[list[str]]:
    """The nodes of each match."""
    platform = CudaPlatform(get_target("h100-sxm"))
    return [[node.name for node in found.nodes] for found in routing.match(graph, plan_storage(graph, platform), platform.gpu, tokens)]


def up_to(graph: Graph, most: int) -> list[RoutingSpec]:
    """The kernels of a function of any number of tokens."""
    platform = CudaPlatform(get_target("h100-sxm"))
    return [found.spec for found in routing.match_up_to(graph, plan_storage(graph, platform), platform.gpu, most)]


def test_what_is_matched() -> None:
    assert matched(model()) == [["h1", "x", "logits", "w"]]
    assert matched(model(norm="")) == [["logits", "w"]]
    assert matched(model(skip=True)) == [["h1", "x", "logits", "w0", "w"]]
    assert matched(model(norm=NORM.replace("%h1", "%o"))) == [["x", "logits", "w"]]
    assert matched(model(router="%logits, @choice")) == [["h1", "x", "logits", "w"]]
    scaled = NORM + "  %y: f32[B, T, 16] = aten.silu.default(%x)\n"
    assert matched(with_format(parse_graph(print_graph(model(norm=scaled)).replace("linear(%x,", "linear(%y,")), "bf16")) == [
        ["logits", "w"]
    ]
    between = (
        print_graph(model())
        .replace("router(%logits)", "router(%l2)")
        .replace("  %w: f32", "  %l2: f32[B, T, 6] = aten.silu.default(%logits)\n  %w: f32")
    )
    assert matched(with_format(parse_graph(between), "bf16")) == []


def test_so_many_tokens_as_run_at_once() -> None:
    assert matched(model(skip=True), 8) == [["h1", "x", "logits", "w0", "w"]]
    found = [[spec.tokens for spec in up_to(model(), most)] for most in (48, 256, 264)]
    assert found == [[None], [None], []]  # a token has a semaphore
    gate, router = Projection(FragmentLayout(256, 2048, "bf16")), RouterSpec(256, 8)
    gpu, counts = CudaPlatform(get_target("h100-sxm")).gpu, (48, 256)
    kinds = [RoutingSpec.of(gate, gpu, None, router, tokens=None, most=most) for most in counts]
    assert [spec.takes(most, gpu.multiprocessors) for spec, most in zip(kinds, counts, strict=True)] == [True, False]


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """The numbers of tokens of the kernels that are emitted."""
    found, emit = list[int | None](), CudaKernels.routing_step
    monkeypatch.setattr(CudaKernels, "routing_step", lambda *args: (found.append(args[1].tokens), emit(*args))[1])
    return found


@needs_emulator
@pytest.mark.parametrize(
    "graph",
    [model(skip=True), model(router="%logits, @choice", attrs='score="sigmoid", groups=3, top_groups=2, scale=1.5')],
    ids=["skip", "groups"],
)
def test_a_model_on_the_emulated_gpu(graph: Graph, emulated: Gpu, tmp_path: Path, called: list[int | None]) -> None:
    compiled = Compiled(graph, random_weights(graph), tmp_path, "h100-sxm", emulated, (1, 4, 8))
    assert called == [1, 4, 8]
    ids = np.random.default_rng(0).integers(0, 40, 12)
    sequence = compiled.executor.add()
    found = [compiled.executor.forward([(sequence, ids[i : i + 1])])[0] for i in range(12)]
    np.testing.assert_allclose(found, compiled.expected(ids), atol=1e-4)
    assert compiled.executor.counters is not None
    ((tokens, experts),) = [(count.tokens, count.experts) for count in compiled.executor.counters.read()]
    assert tokens == 12
    assert 12 < experts < 24 if len(graph.producers["w"].inputs) == 2 and graph.producers["w"].op == "skip" else experts == 24

    first, second = compiled.executor.add(), compiled.executor.add()
    expected = [compiled.expected(text) for text in (ids, ids[::-1].copy())]
    for step in (slice(0, 4), slice(4, 6)):  # decode8 and decode4
        logits = compiled.executor.forward([(first, ids[step]), (second, ids[::-1][step])], all_logits=True)
        np.testing.assert_allclose(logits, np.concatenate([rows[step] for rows in expected]), atol=1e-4)


@needs_emulator
def test_a_range_of_tokens(whole: Gpu, tmp_path: Path, called: list[int | None], monkeypatch: pytest.MonkeyPatch) -> None:
    graph, names, emit = model(skip=True), list[str](), Functions.call
    monkeypatch.setattr(Functions, "call", lambda self, name, *args: (names.append(name), emit(self, name, *args))[1])
    compiled = Compiled(graph, random_weights(graph), tmp_path, "h100-sxm", whole, (11,))
    assert called == [None]
    assert [names.count(name) for name in ("routing_tokens", "gate_up", "split", "router", "norm")] == [1, 1, 0, 0, 2]
    ids = np.random.default_rng(1).integers(0, 40, 21)
    sequence, expected = compiled.executor.add(), compiled.expected(ids)
    for step in (slice(0, 9), slice(9, 21)):
        np.testing.assert_allclose(compiled.executor.forward([(sequence, ids[step])], all_logits=True), expected[step], atol=1e-4)
