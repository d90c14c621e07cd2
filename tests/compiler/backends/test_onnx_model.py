"""The model of the ONNX backend and its executor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from moec.compiler.backends.onnx import OnnxBackend
from moec.compiler.errors import MoecError
from moec.compiler.frontend import huggingface
from moec.compiler.ir import Graph
from moec.compiler.text import parse_graph
from moec.passes.quantize import Quantize
from moec.targets import get_target
from tests.graphs import moe, quantized, random_weights
from tests.onnx_model import TARGET, Built, build

TINY = Path("examples/models/tiny-moe")
INT4 = Quantize(experts="int4_g32", linear="int4_g32", embedding="int8_g64")

needs_tiny = pytest.mark.skipif(not (TINY / "model.safetensors").is_file(), reason="examples/models/tiny-moe is not there")


WIDE = """
graph wide {layers=1, context_length=64, vocab_size=40} {
  input %ids: i64[B, T]
  param @embed.weight: f32[40, 64] as f32
  param @layers.0.norm.weight: f32[64] as f32
  param @layers.0.q.weight: f32[64, 64] as f32
  param @layers.0.k.weight: f32[32, 64] as f32
  param @layers.0.v.weight: f32[32, 64] as f32
  param @layers.0.o.weight: f32[64, 64] as f32
  param @layers.0.gate.weight: f32[6, 64] as f32
  param @layers.0.experts.up: f32[6, 64, 64] as f32
  param @layers.0.experts.down: f32[6, 64, 32] as f32
  param @norm.weight: f32[64] as f32
  %h: f32[B, T, 64] = embedding(%ids, @embed.weight)
  %n: f32[B, T, 64] = rms_norm(%h, @layers.0.norm.weight) {eps=1e-05}
  %q: f32[B, T, 64] = linear(%n, @layers.0.q.weight)
  %k: f32[B, T, 32] = linear(%n, @layers.0.k.weight)
  %v: f32[B, T, 32] = linear(%n, @layers.0.v.weight)
  %q4: f32[B, T, 4, 16] = aten.view.default(%q) {size=["B", "T", 4, 16]}
  %k4: f32[B, T, 2, 16] = aten.view.default(%k) {size=["B", "T", 2, 16]}
  %v4: f32[B, T, 2, 16] = aten.view.default(%v) {size=["B", "T", 2, 16]}
  %a4: f32[B, T, 4, 16] = attention(%q4, %k4, %v4) {scale=0.25}
  %a: f32[B, T, 64] = aten.view.default(%a4) {size=["B", "T", 64]}
  %o: f32[B, T, 64] = linear(%a, @layers.0.o.weight)
  %h1: f32[B, T, 64] = aten.add.Tensor(%h, %o)
  %logits: f32[B, T, 6] = linear(%h1, @layers.0.gate.weight)
  %w: f32[B, T, 2], %i: i64[B, T, 2] = router(%logits) {top_k=2, score="softmax", normalize=true}
  %e: f32[B, T, 64] = experts(%h1, %i, %w, @layers.0.experts.up, @layers.0.experts.down) {activation="silu"}
  %h2: f32[B, T, 64] = aten.add.Tensor(%h1, %e)
  %n2: f32[B, T, 64] = rms_norm(%h2, @norm.weight) {eps=1e-05}
  %out: f32[B, T, 40] = linear(%n2, @embed.weight)
  return %out
}
"""


def wide_moe() -> Graph:
    """One transformer layer with sizes that the quantised operators take."""
    return parse_graph(WIDE)


def tokens_of(count: int, seed: int = 0, vocabulary: int = 40) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocabulary, count)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    graph = quantized(wide_moe(), INT4)
    return build(graph, random_weights(graph), tmp_path_factory.mktemp("int4"))


@pytest.fixture(scope="module")
def portable(tmp_path_factory: pytest.TempPathFactory) -> Built:
    graph = quantized(wide_moe(), INT4)
    return build(graph, random_weights(graph), tmp_path_factory.mktemp("portable"), portable=True)


def test_weights_are_not_in_the_model(built: Built) -> None:
    model = onnx.load(built.folder / "model.onnx", load_external_data=False)
    onnx.checker.check_model(built.folder / "model.onnx")
    inline = sum(len(i.raw_data) for i in model.graph.initializer if i.data_location != onnx.TensorProto.EXTERNAL)
    stored = sum(array.nbytes for p in built.graph.params.values() for array in built.backend.storage(p).values())
    assert inline < 2000 < stored
    assert {e.value for i in model.graph.initializer for e in i.external_data if e.key == "location"} == {
        "weights/00000.safetensors", "weights/shared.safetensors",
    }  # fmt: skip
    assert "QMoE" in {node.op_type for node in model.graph.node}


@pytest.mark.parametrize("kind", ["built", "portable"])
def test_sequences_do_not_disturb_each_other(kind: str, request: pytest.FixtureRequest) -> None:
    model: Built = request.getfixturevalue(kind)
    executor = model.executor(max_sequences=4)
    texts = [tokens_of(n, n) for n in (12, 9, 15, 7)]
    references = [model.reference(t) for t in texts]
    scale = max(np.abs(r).max() for r in references)
    handles = [executor.add() for _ in texts]
    logits = executor.forward([(h, t[:4]) for h, t in zip(handles, texts, strict=True)])
    np.testing.assert_allclose(logits, [r[3] for r in references], atol=1e-5 * scale)
    mixed = executor.forward([(handles[2], texts[2][4:5]), (handles[0], texts[0][4:7]), (handles[3], texts[3][4:5])], all_logits=True)
    expected = np.concatenate([references[2][4:5], references[0][4:7], references[3][4:5]])
    np.testing.assert_allclose(mixed, expected, atol=1e-5 * scale)
    assert [executor.length(h) for h in handles] == [7, 4, 5, 5]
    executor.remove(handles[1])
    handles[1] = executor.add()
    executor.truncate(handles[2], 3)
    again = executor.forward([(handles[1], texts[1][:6]), (handles[2], texts[2][3:5])])
    np.testing.assert_allclose(again, [references[1][5], references[2][4]], atol=1e-5 * scale)
    steps = [(h, t[executor.length(h)][None]) for h, t in zip(handles, texts, strict=True)]
    at = [executor.length(h) for h in handles]
    batch = executor.forward(steps[:2] + steps[3:])
    np.testing.assert_allclose(batch, [references[i][at[i]] for i in (0, 1, 3)], atol=1e-5 * scale)


def test_limits(built: Built) -> None:
    executor = built.executor(max_sequences=2)
    first, second = executor.add(), executor.add()
    with pytest.raises(MoecError, match="2 sequences are open"):
        executor.add()
    with pytest.raises(MoecError, match="65 tokens, more than the context of 64"):
        executor.forward([(second, tokens_of(3)), (first, tokens_of(65))])
    with pytest.raises(MoecError, match="token 40 is outside"):
        executor.forward([(first, np.array([40]))])
    assert executor.length(second) == 0
    assert executor.forward([(first, tokens_of(64))], all_logits=True).shape == (64, 40)
    with pytest.raises(MoecError, match="65 tokens"):
        executor.forward([(first, tokens_of(1))])


def test_portable_model_has_standard_operators_only(portable: Built) -> None:
    model = onnx.load(portable.folder / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert [o.domain for o in model.opset_import] == [""]
    tokens = tokens_of(4)
    feeds = {"ids": tokens[None], "rows": np.arange(4, dtype=np.int32)}
    feeds |= {f"past_{kind}.0": np.zeros((1, 2, 0, 16), np.float32) for kind in ("key", "value")}
    logits = ReferenceEvaluator(str(portable.folder / "model.onnx")).run(None, feeds)[0]
    np.testing.assert_allclose(logits[0], portable.reference(tokens), atol=1e-5)


def test_statement_of_quantised_activations() -> None:
    graph = quantized(wide_moe(), Quantize(experts="int4_g32", linear="int8_g32"))
    assert OnnxBackend(graph, TARGET).activation_quantised() == []
    assert any(line.startswith("e: ") for line in OnnxBackend(graph, TARGET, activations="int8").activation_quantised())
    graph = quantized(wide_moe(), Quantize(experts="int2_g32"))
    assert OnnxBackend(graph, TARGET).activation_quantised() == ["e: QMoE computes 2-bit blocks with int8 activations"]


@pytest.mark.parametrize("name", ["int2_g32", "ternary_g32", "binary_g32"])
@pytest.mark.parametrize("portable", [False, True])
def test_experts_of_few_values(name: str, portable: bool, tmp_path: Path) -> None:
    graph = quantized(wide_moe(), Quantize(experts=name))
    model = build(graph, random_weights(graph), tmp_path, portable=portable)
    operators = {n.op_type for n in onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.node}
    assert ("QMoE" in operators) == (not portable)
    executor, tokens = model.executor(), tokens_of(10)
    logits, reference = executor.forward([(executor.add(), tokens)], all_logits=True), model.reference(tokens)
    error = np.sqrt(np.square(logits - reference).mean() / np.square(reference).mean())
    assert error < (1e-5 if portable else 0.03)  # QMoE computes 2-bit blocks with int8 activations


def test_int8_activations_are_close(tmp_path: Path) -> None:
    graph = quantized(wide_moe(), Quantize(experts="int8_g32", linear="int4_g32"))
    model = build(graph, random_weights(graph), tmp_path, activations="int8")
    executor, tokens = model.executor(), tokens_of(10)
    logits = executor.forward([(executor.add(), tokens)], all_logits=True)
    reference = model.reference(tokens)
    error = np.abs(logits - reference).max() / np.abs(reference).max()
    assert 1e-5 < error < 0.1


@pytest.mark.parametrize(("target", "terms"), [("x86-64-v3", True), ("arm64-neon", False)])
def test_8_bit_products_with_float_activations(target: str, terms: bool, tmp_path: Path) -> None:
    graph = quantized(wide_moe(), Quantize(experts="int4_g32", linear="int8_g32", embedding="int8_g64"))
    model = build(graph, random_weights(graph), tmp_path, target=get_target(target))
    assert model.executor_section["terms"] == terms
    operators = {n.op_type for n in onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.node}
    assert ("Round" in operators) == terms
    executor, tokens = model.executor(), tokens_of(10)
    logits = executor.forward([(executor.add(), tokens)], all_logits=True)
    reference = model.reference(tokens)
    error = np.sqrt(np.square(logits - reference).mean() / np.square(reference).mean())
    assert error < (2e-4 if terms else 2e-6)


@pytest.mark.parametrize("portable", [False, True])
def test_steps_ahead_are_those_of_one_call_each(portable: bool, tmp_path: Path) -> None:
    graph = quantized(wide_moe(), INT4)
    model = build(graph, random_weights(graph), tmp_path, portable=portable)
    executor, tokens = model.executor(), tokens_of(10)
    one, other = executor.add(), executor.add()
    found = executor.ahead([(one, tokens), (other, tokens[:4])], 3)
    assert [executor.length(one), executor.length(other)] == [12, 6]
    for index, length in enumerate((10, 4)):
        handle, step = executor.add(), tokens[:length]
        expected = []
        for _ in range(3):
            step = executor.best([(handle, step)]).ids
            expected += step.tolist()
        assert found.ids[:, index].tolist() == expected
    with pytest.raises(MoecError, match="more than the context"):
        executor.ahead([(one, tokens[:1])], 64)
    assert executor.length(one) == 12


def test_bidirectional_attention_is_refused() -> None:
    graph = moe()
    nodes = [replace(n, attrs={**n.attrs, "causal": False}) if n.op == "attention" else n for n in graph.nodes]
    with pytest.raises(MoecError, match="not causal"):
        OnnxBackend(graph.with_nodes(nodes), TARGET)


@needs_tiny
@pytest.mark.parametrize("portable", [False, True])
def test_tiny_moe_writes_what_transformers_writes(portable: bool, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    graph, weights = huggingface.load(TINY)
    executor = build(graph, weights, tmp_path, portable=portable).executor()
    model = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    prompt = np.arange(20, 36)
    expected = model.generate(torch.from_numpy(prompt)[None], max_new_tokens=24, do_sample=False, eos_token_id=None)[0].tolist()
    sequence, written = executor.add(), prompt.tolist()
    logits = executor.forward([(sequence, prompt)])
    for _ in range(24):
        written.append(int(logits[0].argmax()))
        logits = executor.forward([(sequence, np.array(written[-1:]))])
    assert written == expected
