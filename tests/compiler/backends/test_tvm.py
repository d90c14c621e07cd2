"""The TVM backend and its executor against the interpreter."""

from __future__ import annotations

import platform
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from moec.compiler.backends.tvm.backend import TvmBackend
from moec.compiler.frontend import huggingface
from moec.compiler.ir import Graph
from moec.compiler.text import parse_graph
from moec.runtime.errors import MoecError
from moec.runtime.shared_executor import SharedExecutor
from moec.targets import get_target
from tests.compiler.backends.tvm_model import Compiled
from tests.graphs import MOE, moe, random_weights

TINY = "examples/models/tiny-moe"


def with_format(graph: Graph, name: str) -> Graph:
    """The graph with all matrices in a format."""
    return graph.with_params(replace(p, format=name) for p in graph.params.values() if len(p.type.shape) > 1)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    return Compiled(moe(), random_weights(moe()), tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    graph, weights = huggingface.load(TINY)
    return Compiled(graph, weights, tmp_path_factory.mktemp("tiny"))


def random_ids(model: Compiled, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, model.executor.vocab_size, length)


@pytest.mark.parametrize("length", [1, 2, 17, 64])
def test_logits_are_those_of_the_interpreter(small: Compiled, length: int) -> None:
    ids = random_ids(small, length)
    np.testing.assert_allclose(small.logits(ids), small.expected(ids), atol=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        "int4_g32",
        "int8_g32_asym",
        "int3_channel",
        "int2_g64_asym",
        "ternary_g32",
        "ternary_channel",
        "binary_g32",
        "bf16",
        "f16",
        "fp8_channel",
        "fp8_block128",
    ],
)
def test_formats(name: str, tmp_path: Path) -> None:
    graph = with_format(moe(), name)
    model = Compiled(graph, random_weights(graph), tmp_path, sizes=(33,))
    ids = random_ids(model, 33)
    np.testing.assert_allclose(model.logits(ids), model.expected(ids), atol=2e-3)


FLAT = """
  %x: f32[B*T, 16] = aten.view.default(%h1) {size=["B*T", 16]}
  %xn: f32[B*T, 16] = rms_norm(%x, @norm.weight) {eps=1e-05}
  %logits: f32[B*T, 6] = linear(%xn, @layers.0.gate.weight)
  %w: f32[B*T, 2], %i: i64[B*T, 2] = router(%logits) {top_k=2, score="sigmoid", groups=3, top_groups=2}
  %y: f32[B*T, 16] = experts(%xn, %i, %w, @layers.0.experts.up, @layers.0.experts.down EXTRA
  %e: f32[B, T, 16] = aten.view.default(%y) {size=["B", "T", 16]}
"""


@pytest.mark.parametrize(
    "extra",
    [
        ') {activation="gelu", gated=false}',
        ', @up.bias, @down.bias) {activation="swiglu_oai", limit=0.5}',
        ', @up.bias, @down.bias) {activation="swiglu_oai"}',
    ],
)
def test_tokens_in_one_axis_and_other_experts(extra: str, tmp_path: Path) -> None:
    head, rest = MOE.split("  %logits: f32", 1)
    tail = "  %h2: f32" + rest.split("  %h2: f32", 1)[1]
    text = head + FLAT.replace(" EXTRA", extra) + tail
    if "gated=false" in extra:
        text = text.replace("f32[6, 24, 16]", "f32[6, 12, 16]")
    if "bias" in extra:
        text = text.replace(
            "  param @norm.w", "  param @up.bias: f32[6, 24] as bf16\n  param @down.bias: f32[6, 16] as f32\n  param @norm.w"
        )
    graph = parse_graph(text)
    model = Compiled(graph, random_weights(graph), tmp_path)
    for length in (30, 1):
        ids = random_ids(model, length)
        np.testing.assert_allclose(model.logits(ids), model.expected(ids), atol=1e-4)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="runs code for x86-64")
def test_narrower_vectors(tmp_path: Path) -> None:
    model = Compiled(moe(), random_weights(moe()), tmp_path, target="x86-64-v3")
    ids = random_ids(model, 50)
    np.testing.assert_allclose(model.logits(ids), model.expected(ids), atol=1e-4)


def test_foreign_platforms_need_their_linker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    target = "x86-64-v3" if platform.machine() == "aarch64" else "arm64-neon"
    with pytest.raises(MoecError, match="no C compiler to link with"):
        TvmBackend(moe(), get_target(target)).build(tmp_path, {})


def test_tiny_model_in_int4(tmp_path: Path) -> None:
    graph, weights = huggingface.load(TINY)
    model = Compiled(with_format(graph, "int4_g64"), weights, tmp_path)
    ids = random_ids(model, 100)
    found, expected = (torch.from_numpy(x).double().log_softmax(-1) for x in (model.logits(ids), model.expected(ids)))
    assert (expected.exp() * (expected - found)).sum(-1).mean() < 1e-4


def test_tiny_model_generates_as_transformers_does(tiny: Compiled) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    prompt = random_ids(tiny, 12, seed=3)
    expected = model.generate(torch.from_numpy(prompt)[None], max_new_tokens=32, do_sample=False, eos_token_id=None)[0, 12:].tolist()
    sequence, found = tiny.executor.add(), list[int]()
    logits = tiny.executor.forward([(sequence, prompt)])
    while len(found) < 32:
        found.append(int(logits[0].argmax()))
        logits = tiny.executor.forward([(sequence, np.array(found[-1:]))])
    tiny.executor.remove(sequence)
    assert found == expected


def test_sequences_in_pieces_beside_each_other(tiny: Compiled) -> None:
    rng = np.random.default_rng(1)
    texts = [random_ids(tiny, n, seed=n) for n in (70, 1, 33, 150)]
    handles = [tiny.executor.add() for _ in texts]
    done = [0] * len(texts)
    found: list[list[np.ndarray]] = [[] for _ in texts]
    while any(d < len(t) for d, t in zip(done, texts, strict=True)):
        chosen = [i for i, t in enumerate(texts) if done[i] < len(t) and rng.random() < 0.7]
        sizes = [min(len(texts[i]) - done[i], int(rng.integers(1, 40))) for i in chosen]
        if not chosen:
            continue
        steps = [(handles[i], texts[i][done[i] : done[i] + n]) for i, n in zip(chosen, sizes, strict=True)]
        logits = np.split(tiny.executor.forward(steps, all_logits=True), np.cumsum(sizes)[:-1])
        for i, n, piece in zip(chosen, sizes, logits, strict=True):
            found[i].append(piece)
            done[i] += n
    for text, handle, pieces in zip(texts, handles, found, strict=True):
        np.testing.assert_allclose(np.concatenate(pieces), tiny.expected(text), atol=1e-3)
        assert tiny.executor.length(handle) == len(text)
        tiny.executor.remove(handle)


def test_last_logits_only(small: Compiled) -> None:
    a, b = random_ids(small, 20, 1), random_ids(small, 5, 2)
    first, second = small.executor.add(), small.executor.add()
    logits = small.executor.forward([(first, a), (second, b)])
    np.testing.assert_allclose(logits, [small.expected(a)[-1], small.expected(b)[-1]], atol=1e-4)
    small.executor.remove(first)
    small.executor.remove(second)


def test_truncation_goes_back(small: Compiled) -> None:
    ids = random_ids(small, 50)
    sequence = small.executor.add()
    small.executor.forward([(sequence, ids)])
    small.executor.truncate(sequence, 7)
    assert small.executor.length(sequence) == 7
    other = np.concatenate([ids[:7], random_ids(small, 40, seed=9)])
    logits = small.executor.forward([(sequence, other[7:])], all_logits=True)
    np.testing.assert_allclose(logits, small.expected(other)[7:], atol=1e-4)
    small.executor.remove(sequence)


def test_prompts_longer_than_a_call(tiny: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny.executor, "_chunk", 64)
    ids = random_ids(tiny, 300)
    sequence = tiny.executor.add()
    logits = tiny.executor.forward([(sequence, ids)])
    np.testing.assert_allclose(logits[0], tiny.expected(ids)[-1], atol=1e-3)
    tiny.executor.remove(sequence)


def test_errors_leave_sequences_as_they_were(small: Compiled) -> None:
    sequence = small.executor.add()
    small.executor.forward([(sequence, random_ids(small, 10))])
    for tokens, message in (
        ([40], "token id 40 is not in the vocabulary of 40"),
        ([0] * 55, "longer than the context of 64"),
        ([], "at least one"),
    ):
        with pytest.raises(MoecError, match=message):
            small.executor.forward([(sequence, np.array(tokens, np.int64))])
    with pytest.raises(MoecError, match="twice"):
        small.executor.forward([(sequence, np.array([1])), (sequence, np.array([2]))])
    assert small.executor.length(sequence) == 10
    small.executor.remove(sequence)
    with pytest.raises(MoecError, match="no sequence has the handle"):
        small.executor.length(sequence)


def test_steps_ahead_are_those_of_one_call_each(small: Compiled) -> None:
    executor, ids = small.executor, random_ids(small, 12, seed=4)
    assert executor.portion == 1  # the processor has nothing to gain
    first, second, third = (executor.add() for _ in range(3))
    found = executor.ahead([(first, ids), (second, ids[:3])], 4)
    assert [executor.length(first), executor.length(second)] == [12 + 3, 3 + 3]
    for index, length in enumerate((12, 3)):
        text = np.append(ids[:length], found.ids[:, index])
        np.testing.assert_array_equal(small.expected(text)[length - 1 : -1].argmax(-1), found.ids[:, index])
    executor.forward([(third, random_ids(small, 60))])
    with pytest.raises(MoecError, match="a sequence of 65 tokens is longer than the context of 64"):
        executor.ahead([(first, ids[:1]), (third, ids[:1])], 6)
    assert [executor.length(first), executor.length(third)] == [15, 60]
    for handle in (first, second, third):
        executor.remove(handle)


def test_not_more_sequences_than_agreed(small: Compiled) -> None:
    handles = [small.executor.add() for _ in range(8)]
    with pytest.raises(MoecError, match="all 8 sequences are in use"):
        small.executor.add()
    for handle in handles:
        small.executor.remove(handle)


def test_experts_are_counted_for_sequences_of_several_threads(small: Compiled) -> None:
    shared = SharedExecutor(small.executor, 8)
    shared.counts(reset=True)

    def run(seed: int) -> None:
        handle = shared.add()
        for size in (20, 1, 1, 7):
            shared.forward([(handle, random_ids(small, size, seed))], all_logits=True)
        shared.remove(handle)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, range(6)))
    counts = shared.counts()
    assert counts is not None
    assert [(c.name, c.tokens, c.experts, c.slots) for c in counts] == [("layers.0.experts.up", 6 * 29, 6 * 58, 6 * 58)]
    first, second = shared.add(), shared.add()
    shared.counts(reset=True)
    shared.forward([(first, random_ids(small, 1)), (second, random_ids(small, 3))], all_logits=True)
    assert [(c.tokens, c.experts) for c in shared.counts() or ()] == [(4, 8)]
    shared.remove(first)
    shared.remove(second)
