"""Models for the CUDAExecutionProvider. Those of float16 run on a processor as well, whose kernels are others of the same operators."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from moec.compiler.backends import make_backend
from moec.compiler.backends.onnx import Activations, OnnxBackend
from moec.compiler.backends.onnx.half import exact_linears
from moec.compiler.errors import MoecError
from moec.compiler.ir import Graph
from moec.compiler.text import parse_graph
from moec.compiler.weights import MemoryWeights
from moec.passes.quantize import Quantize
from moec.runtime.onnx_gpu import CPU, CUDA, check_started
from moec.targets import get_target
from tests.graphs import quantized, random_weights
from tests.onnx_model import TARGET, Built, build

GPU = get_target("h100-sxm")

TEXT = """
graph g {layers=1, context_length=1024, vocab_size=40} {
  input %ids: i64[B, T]
  input %positions: i64[B, T]
  param @embed.weight: f32[40, 64] as f32
  param @layers.0.n1.weight: f32[64] as bf16
  param @layers.0.q.weight: f32[64, 64] as f32
  param @layers.0.k.weight: f32[32, 64] as f32
  param @layers.0.v.weight: f32[32, 64] as f32
  param @layers.0.o.weight: f32[64, 64] as f32
  param @layers.0.qn.weight: f32[16] as bf16
  param @layers.0.n2.weight: f32[64] as bf16
  param @layers.0.gate.weight: f32[6, 64] as f32
  param @layers.0.experts.up: f32[6, 128, 64] as f32
  param @layers.0.experts.down: f32[6, 64, 64] as f32
  param @norm.weight: f32[64] as bf16
  param @freq: f32[8] as f32
  %h0: f32[B, T, 64] = embedding(%ids, @embed.weight)
  %h: f32[B, T, 64] = aten.mul.Tensor(%h0) {other=100000.0}
  %n: f32[B, T, 64] = rms_norm(%h, @layers.0.n1.weight) {eps=1e-05}
  %q: f32[B, T, 64] = linear(%n, @layers.0.q.weight)
  %k: f32[B, T, 32] = linear(%n, @layers.0.k.weight)
  %v: f32[B, T, 32] = linear(%n, @layers.0.v.weight)
  %q4: f32[B, T, 4, 16] = aten.view.default(%q) {size=["B", "T", 4, 16]}
  %k4: f32[B, T, 2, 16] = aten.view.default(%k) {size=["B", "T", 2, 16]}
  %v4: f32[B, T, 2, 16] = aten.view.default(%v) {size=["B", "T", 2, 16]}
  %q5: f32[B, T, 4, 16] = rms_norm(%q4, @layers.0.qn.weight) {eps=1e-06, offset=1.0}
  %p: f32[B, T] = aten._to_copy.default(%positions) {dtype="f32"}
  %p1: f32[B, T, 1] = aten.view.default(%p) {size=["B", "T", 1]}
  %angle: f32[B, T, 8] = aten.mul.Tensor(%p1, @freq)
  %both: f32[B, T, 16] = aten.cat.default(%angle, %angle) {tensors=2, dim=2}
  %cos: f32[B, T, 16] = aten.cos.default(%both)
  %sin: f32[B, T, 16] = aten.sin.default(%both)
  %qr: f32[B, T, 4, 16] = rope(%q5, %cos, %sin)
  %kr: f32[B, T, 2, 16] = rope(%k4, %cos, %sin)
  %a4: f32[B, T, 4, 16] = attention(%qr, %kr, %v4) {ATTENTION}
  %a: f32[B, T, 64] = aten.view.default(%a4) {size=["B", "T", 64]}
  %o: f32[B, T, 64] = linear(%a, @layers.0.o.weight)
  %h1: f32[B, T, 64] = aten.add.Tensor(%h, %o)
  %n2: f32[B, T, 64] = rms_norm(%h1, @layers.0.n2.weight) {eps=1e-05}
  %scores: f32[B, T, 6] = linear(%n2, @layers.0.gate.weight)
  %w: f32[B, T, K], %i: i64[B, T, K] = router(%scores) {top_k=K, ROUTER}
  SKIP
  %e: f32[B, T, 64] = experts(%n2, %i, %w, @layers.0.experts.up, @layers.0.experts.down) {EXPERTS}
  %es: f32[B, T, 64] = aten.mul.Tensor(%e) {other=30000.0}
  %h2: f32[B, T, 64] = aten.add.Tensor(%h1, %es)
  %n3: f32[B, T, 64] = rms_norm(%h2, @norm.weight) {eps=1e-05}
  %logits: f32[B, T, 40] = linear(%n3, @embed.weight)
  return %logits
}
"""
"""One layer, whose residual stream is far beyond float16."""


def layer(
    top_k: int = 3,
    router: str = 'score="softmax", normalize=true',
    skip: str = "",
    experts: str = 'activation="silu"',
    attention: str = "scale=0.3",
) -> Graph:
    """The layer with some attributes; `skip`: those of a node that skips experts."""
    text = TEXT.replace("ROUTER", router).replace("EXPERTS", experts).replace("ATTENTION", attention)
    if skip:
        text = text.replace("experts(%n2, %i, %w", "experts(%n2, %j, %u")
        skip = f"%u: f32[B, T, K], %j: i64[B, T, K] = skip(%w, %i) {{experts=6, {skip}}}"
    return parse_graph(text.replace("SKIP", skip).replace("K]", f"{top_k}]").replace("=K,", f"={top_k},"))


def compiled(graph: Graph, folder: Path, activations: Activations = "float16", std: float = 0.3) -> Built:
    """A graph compiled for a GPU, to be run on the processor."""
    built = build(graph, random_weights(graph, std=std), folder, target=GPU, activations=activations)
    assert built.executor_section["provider"] == CUDA
    return replace(built, executor_section={**built.executor_section, "provider": CPU})


def tokens_of(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 40, count)


def error_of(built: Built, tokens: np.ndarray) -> float:
    """The root mean square error of logits, over their own, of tokens that come in parts."""
    executor = built.executor()
    sequence, cuts = executor.add(), (0, 5, 6, 7, len(tokens))
    parts = [executor.forward([(sequence, tokens[a:b])], all_logits=True) for a, b in pairwise(cuts)]
    logits, reference = np.concatenate(parts), built.reference(tokens)
    assert logits.dtype == np.float32
    return float(np.sqrt(np.square(logits - reference).mean() / np.square(reference).mean()))


def operators(folder: Path) -> Counter[str]:
    return Counter(n.op_type for n in onnx.load(folder / "model.onnx", load_external_data=False).graph.node)


@pytest.mark.parametrize(
    ("experts", "linear", "operator", "bound"),
    [
        ("int4_g32", "int4_g32", "QMoE", 2e-3),
        ("int4_g32_asym", "int8_g32", "QMoE", 2e-3),
        ("int3_g64", "int4_g16", "QMoE", 2e-3),
        ("int8_g32", "int8_g32", "QMoE", 3e-2),  # a processor's QMoE rounds activations to int8 with these
        ("int2_g32", "bf16", "QMoE", 6e-2),  # and these
        ("int2_g32_asym", "int2_g32", "QMoE", 2e-3),
        ("int4_g16", "f16", "If", 2e-3),
        ("bf16", "bf16", "MoE", 2e-3),
        ("f32", "int8_channel", "MoE", 2e-3),
    ],
)
def test_formats(experts: str, linear: str, operator: str, bound: float, tmp_path: Path) -> None:
    graph = quantized(layer(), Quantize(experts=experts, linear=linear, embedding="int8_g64"))
    built = compiled(graph, tmp_path)
    assert operators(tmp_path)[operator] > 0
    assert error_of(built, tokens_of(23)) < bound


@pytest.mark.parametrize(
    ("router", "skip"),
    [
        ('score="softmax"', ""),
        ('score="sigmoid", normalize=true, scale=2.5', ""),
        ('score="softmax_topk"', ""),
        ('score="softmax", groups=3, top_groups=2, group_score="max"', ""),
        ('score="identity"', ""),  # weights of either sign
        ('score="softmax", normalize=true', "top_p=0.6"),
        ('score="softmax", normalize=true', "ratio=0.7, normalize=true"),
    ],
)
def test_routing(router: str, skip: str, tmp_path: Path) -> None:
    graph = quantized(layer(2, router, skip), Quantize(experts="int4_g32", linear="int4_g32"))
    built = compiled(graph, tmp_path)
    assert operators(tmp_path)["QMoE"] == 1
    assert error_of(built, tokens_of(23)) < 2e-3


def test_experts_of_tokens_in_one_row_each(tmp_path: Path) -> None:
    text = TEXT.replace("SKIP", "").replace("K]", "2]").replace("=K,", "=2,").replace("ROUTER", 'score="softmax"')
    text = text.replace("EXPERTS", 'activation="silu"').replace("ATTENTION", "scale=0.3")
    text = text.replace(
        "  %scores: f32[B, T, 6] = linear(%n2,",
        '  %f: f32[B*T, 64] = aten.view.default(%n2) {size=["B*T", 64]}\n  %scores: f32[B*T, 6] = linear(%f,',
    )
    text = text.replace("%w: f32[B, T, 2], %i: i64[B, T, 2]", "%w: f32[B*T, 2], %i: i64[B*T, 2]")
    text = text.replace("%e: f32[B, T, 64] = experts(%n2,", "%e0: f32[B*T, 64] = experts(%f,")
    text = text.replace("  %es:", '  %e: f32[B, T, 64] = aten.view.default(%e0) {size=["B", "T", 64]}\n  %es:')
    for experts in ("int4_g32", "bf16"):
        built = compiled(quantized(parse_graph(text), Quantize(experts=experts, linear="int4_g32")), tmp_path / experts)
        assert error_of(built, tokens_of(23)) < 2e-3


@pytest.mark.parametrize("experts", ['activation="swiglu_oai", limit=1.5', 'activation="gelu"', 'activation="silu", limit=0.5'])
@pytest.mark.parametrize("attention", ["scale=0.3, window=7", "scale=0.3, chunk=8", "scale=0.2, softcap=5.0"])
def test_attributes(experts: str, attention: str, tmp_path: Path) -> None:
    graph = quantized(layer(experts=experts, attention=attention), Quantize(experts="int4_g64", linear="int4_g32"))
    built = compiled(graph, tmp_path)
    assert ("QMoE" in operators(tmp_path)) == ("gelu" not in experts)
    assert error_of(built, tokens_of(23)) < 2e-3


def test_experts_are_chosen_as_in_float32(tmp_path: Path) -> None:
    graph = layer(1, 'score="softmax"')
    weights = {name: tensor.clone() for name, tensor in random_weights(graph).tensors.items()}
    gate = weights["layers.0.gate.weight"]
    gate[:] = gate[:1] * (1 + 1e-5 * torch.arange(6))[:, None]  # float16 cannot tell their logits apart
    built = build(graph, MemoryWeights(weights), tmp_path, target=GPU, activations="float16")
    assert error_of(replace(built, executor_section={**built.executor_section, "provider": CPU}), tokens_of(40)) < 2e-3


def test_what_stays_float32(tmp_path: Path) -> None:
    graph = layer()
    assert exact_linears(graph) == {"scores", "logits"}
    compiled(quantized(graph, Quantize(experts="int4_g32", linear="int4_g32", embedding="int8_g64")), tmp_path)
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    produced = {name: n for n in model.graph.node for name in n.output}
    halves = {n.output[0] for n in model.graph.node if n.op_type == "Cast" and n.attribute[0].i == onnx.TensorProto.FLOAT16}
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            assert (node.output[0] == "logits.1") == (produced[node.input[0]].op_type == "RMSNormalization"), node
        if node.op_type in ("SkipSimplifiedLayerNormalization", "Softmax", "TopK", "Add", "MatMul") or node.output[0] == "n":
            assert not halves & set(node.input), node
    assert produced["q5"].input[1] in halves  # the norm of what was widened reads and gives 16 bits
    assert not any(n.op_type == "Cast" and set(n.input) & {"q", "q5"} for n in model.graph.node)
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)}
    assert kinds["logits"] == onnx.TensorProto.FLOAT
    assert kinds["past_key.0"] == kinds["present_value.0"] == onnx.TensorProto.FLOAT16
    read = {name for n in model.graph.node for name in n.input} | {o.name for o in model.graph.output}
    assert all(read & set(n.output) for n in model.graph.node)
    assert {i.name for i in model.graph.initializer} <= read


@pytest.mark.parametrize("step", [Quantize(experts="int4_g32", linear="int4_g32", embedding="int8_g64"), Quantize(experts="bf16")])
def test_types_of_a_bfloat16_model_fit(step: Quantize, tmp_path: Path) -> None:
    built = compiled(quantized(layer(), step), tmp_path, "bfloat16")
    assert (built.executor_section["activations"], built.executor_section["cache_type"]) == ("bfloat16", onnx.TensorProto.BFLOAT16)
    onnx.checker.check_model(tmp_path / "model.onnx")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    with pytest.raises(Exception, match="NOT_IMPLEMENTED"):  # types are checked before a processor's kernels are found missing
        ort.InferenceSession(tmp_path / "model.onnx", options, providers=[CPU])


def test_caches_grow_on_the_device(tmp_path: Path) -> None:
    graph = quantized(layer(), Quantize(experts="int4_g32", linear="int4_g32", embedding="int8_g64"))
    built = compiled(graph, tmp_path)
    executor = built.executor(max_sequences=4)
    texts = [tokens_of(n, n) for n in (300, 20, 290)]
    references = [built.reference(t) for t in texts]
    scale = max(np.abs(r).max() for r in references)
    handles: list[int] = []
    for text, reference in zip(texts, references, strict=True):  # more slots each time, and more than 256 tokens in the end
        handles.append(executor.add())
        logits = executor.forward([(handles[-1], text[:-12])])
        np.testing.assert_allclose(logits[0], reference[-13], atol=1e-2 * scale)
    for back in range(12, 0, -1):
        steps = [(h, t[-back:][:1]) for h, t in zip(handles, texts, strict=True)]
        expected = [r[-back] for r in references]
        np.testing.assert_allclose(executor.forward(steps), expected, atol=1e-2 * scale)
    executor.truncate(handles[0], 100)
    np.testing.assert_allclose(executor.forward([(handles[0], texts[0][100:101])])[0], references[0][100], atol=1e-2 * scale)


def test_options_that_do_not_suit_a_target() -> None:
    graph = layer()
    with pytest.raises(MoecError, match="h100-sxm: --portable writes a model of standard operators, for CPUs"):
        OnnxBackend(graph, GPU, portable=True)
    with pytest.raises(MoecError, match="--activations int8 is for CPUs: target h100-sxm"):
        OnnxBackend(graph, GPU, activations="int8")
    with pytest.raises(MoecError, match="--activations float16 is for GPUs"):
        OnnxBackend(graph, TARGET, activations="float16")
    with pytest.raises(MoecError, match="kind of activations 'f16'"):
        make_backend("onnx", graph, GPU, activations="f16")


def test_an_artifact_for_a_gpu_says_what_it_needs(tmp_path: Path) -> None:
    built = compiled(layer(), tmp_path)
    with pytest.raises(MoecError, match=r"has no CUDAExecutionProvider: pip uninstall .* 'onnxruntime-gpu\[cuda,cudnn\]>=1.31'"):
        replace(built, executor_section={**built.executor_section, "provider": CUDA}).executor()
    with pytest.raises(MoecError, match="which this version of moec does not know"):
        replace(built, executor_section={**built.executor_section, "provider": "NoSuchProvider"}).executor()
    with pytest.raises(MoecError, match="cannot start its CUDAExecutionProvider, for the reason above: it needs an NVIDIA GPU"):
        check_started(ort.InferenceSession(tmp_path / "grow.onnx", providers=[CPU]), CUDA, "a.moec")
