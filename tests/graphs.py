"""Small graphs that tests share, and random weights for any graph."""

from __future__ import annotations

from dataclasses import replace

import torch

from moec.compiler.calibration.text import Text
from moec.compiler.context import Context
from moec.compiler.factors import with_factors
from moec.compiler.interpreter import Interpreter
from moec.compiler.ir import Graph
from moec.compiler.layers import moe_layers
from moec.compiler.model import Model
from moec.compiler.text import parse_graph
from moec.compiler.weights import MemoryWeights, constant
from moec.passes.quantize import Quantize

MOE = """
graph small {layers=1, context_length=64, vocab_size=40} {
  input %ids: i64[B, T]
  input %positions: i64[B, T]
  param @embed.weight: f32[40, 16] as f32
  param @layers.0.norm.weight: f32[16] as f32
  param @layers.0.q.weight: f32[16, 16] as f32
  param @layers.0.k.weight: f32[8, 16] as f32
  param @layers.0.v.weight: f32[8, 16] as f32
  param @layers.0.o.weight: f32[16, 16] as f32
  param @layers.0.gate.weight: f32[6, 16] as f32
  param @layers.0.experts.up: f32[6, 24, 16] as f32
  param @layers.0.experts.down: f32[6, 16, 12] as f32
  param @norm.weight: f32[16] as f32
  %h: f32[B, T, 16] = embedding(%ids, @embed.weight)
  %n: f32[B, T, 16] = rms_norm(%h, @layers.0.norm.weight) {eps=1e-05}
  %q: f32[B, T, 16] = linear(%n, @layers.0.q.weight)
  %k: f32[B, T, 8] = linear(%n, @layers.0.k.weight)
  %v: f32[B, T, 8] = linear(%n, @layers.0.v.weight)
  %q4: f32[B, T, 4, 4] = aten.view.default(%q) {size=["B", "T", 4, 4]}
  %k4: f32[B, T, 2, 4] = aten.view.default(%k) {size=["B", "T", 2, 4]}
  %v4: f32[B, T, 2, 4] = aten.view.default(%v) {size=["B", "T", 2, 4]}
  %a4: f32[B, T, 4, 4] = attention(%q4, %k4, %v4) {scale=0.5}
  %a: f32[B, T, 16] = aten.view.default(%a4) {size=["B", "T", 16]}
  %o: f32[B, T, 16] = linear(%a, @layers.0.o.weight)
  %h1: f32[B, T, 16] = aten.add.Tensor(%h, %o)
  %logits: f32[B, T, 6] = linear(%h1, @layers.0.gate.weight)
  %w: f32[B, T, 2], %i: i64[B, T, 2] = router(%logits) {top_k=2, score="softmax", normalize=true}
  %e: f32[B, T, 16] = experts(%h1, %i, %w, @layers.0.experts.up, @layers.0.experts.down) {activation="silu"}
  %h2: f32[B, T, 16] = aten.add.Tensor(%h1, %e)
  %n2: f32[B, T, 16] = rms_norm(%h2, @norm.weight) {eps=1e-05}
  %out: f32[B, T, 40] = linear(%n2, @embed.weight)
  return %out
}
"""


def moe() -> Graph:
    """One transformer layer of 6 experts, top-2, grouped-query attention, tied embeddings."""
    return parse_graph(MOE)


def model(seed: int = 0) -> Model:
    """The layer of `moe` with random weights."""
    return Model(moe(), random_weights(moe(), seed))


def quantized(graph: Graph, step: Quantize) -> Graph:
    """A graph with the formats that a pass chooses."""
    return step.run(Model(graph, MemoryWeights({})), Context()).graph


def random_weights(graph: Graph, seed: int = 0, std: float = 0.3) -> MemoryWeights:
    """Normally distributed weights for every parameter."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {n: [d for d in p.type.shape if isinstance(d, int)] for n, p in graph.params.items()}
    return MemoryWeights({n: torch.randn(s, generator=generator) * std for n, s in shapes.items()})


def text(seed: int = 0, windows: int = 6, tokens: int = 16) -> Text:
    """Random calibration windows of two domains for `moe`."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 40, (windows, tokens), generator=generator)
    domain = tuple(index % 2 for index in range(windows))
    return Text(ids, domain, ("a", "b"), torch.randint(0, 40, (2, tokens + 1), generator=generator))


def context(subject: Model, seed: int = 0) -> Context:
    """A context with calibration text, in which `subject` is the reference."""
    return Context(text=text(seed), reference=subject, seed=seed)


def logits(subject: Model, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """The logits of a model on a few random tokens: [B, T, V]."""
    ids = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(seed))
    return Interpreter(subject.graph, subject.weights, dtype=dtype)(ids=ids, positions=torch.arange(9).expand(2, -1))[0]


def factored(subject: Model, ranks: tuple[int, int] = (3, 5), *, whole: bool = True, fmt: str = "f32", seed: int = 0) -> Model:
    """A model whose experts have random low-rank factors of these ranks, at up and down (0: none).

    Args:
        whole: the projections stay what they are beside the factors; otherwise they are zero, and their format says so.
    """
    generator = torch.Generator().manual_seed(seed)
    (layer,) = moe_layers(subject.graph)
    wanted = {name: rank for name, rank in zip((layer.up, layer.down), ranks, strict=True) if rank}
    graph = with_factors(subject.graph, layer, wanted, dict.fromkeys(wanted, fmt))
    names = [name for pair in moe_layers(graph)[0].factors.values() for name in pair]
    shapes = {name: [int(d) for d in graph.params[name].type.shape] for name in (*names, *wanted)}
    edits = {name: constant(torch.randn(shapes[name], generator=generator) * 0.4) for name in names}
    if not whole:
        graph = graph.with_params([replace(graph.params[name], format="zero") for name in wanted])
        edits |= {name: constant(torch.zeros(shapes[name])) for name in wanted}
    return subject.edited(graph, edits)
