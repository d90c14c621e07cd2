"""AWQ's scales leave the function alone and make rounding cost less."""

from __future__ import annotations

import pytest
import torch

from moec.compiler.context import Context
from moec.compiler.folding import readers, value_paths
from moec.compiler.ir import Graph
from moec.compiler.model import Model
from moec.compiler.text import parse_graph, print_graph
from moec.compiler.verify import verify
from moec.compiler.weights import MemoryWeights
from moec.passes.awq import Awq
from moec.passes.quantize import Quantize
from moec.runtime.errors import MoecError
from tests import graphs


def normed() -> Graph:
    """The small graph with a norm before its experts."""
    source = print_graph(graphs.moe())
    source = source.replace("  param @norm.weight", "  param @layers.0.norm2.weight: f32[16] as bf16\n  param @norm.weight")
    source = source.replace("  %logits:", "  %m: f32[B, T, 16] = rms_norm(%h1, @layers.0.norm2.weight) {eps=1e-05, offset=1.0}\n  %logits:")
    return parse_graph(source.replace("linear(%h1, @layers.0.gate", "linear(%m, @layers.0.gate").replace("experts(%h1,", "experts(%m,"))


def uneven(seed: int = 0) -> Model:
    """Random weights, with norms that make some channels much larger than others."""
    graph = normed()
    tensors = dict(graphs.random_weights(graph, seed).tensors)
    for name in ("layers.0.norm.weight", "layers.0.norm2.weight"):
        tensors[name] = torch.exp(torch.randn(16, generator=torch.Generator().manual_seed(seed + 1)))
    return Model(graph, MemoryWeights(tensors))


def test_the_function_stays() -> None:
    source = uneven()
    context = graphs.context(source)
    scaled = Awq(experts="int2_g32", linear="int3_g32").run(source, context)
    verify(scaled.graph)
    assert not torch.equal(scaled.load("layers.0.norm2.weight"), source.load("layers.0.norm2.weight"))
    assert not torch.equal(scaled.load("layers.0.experts.down", 1), source.load("layers.0.experts.down", 1))
    assert torch.allclose(scaled.load("layers.0.experts.up")[2], scaled.load("layers.0.experts.up", 2))
    assert torch.allclose(graphs.logits(scaled), graphs.logits(source), atol=1e-9)
    assert scaled.graph.params["layers.0.norm2.weight"].format == "f32"
    assert context.journal[0]["alpha"]["m"] > 0


def test_rounding_costs_less() -> None:
    source = uneven()
    context = graphs.context(source)
    step, scales = Quantize(experts="int3_g32", linear="int3_g32"), Awq(experts="int3_g32", linear="int3_g32")
    plain = context.damage(step.run(source, context), "x").kl_divergence
    scaled = context.damage(step.run(scales.run(source, context), context), "x").kl_divergence
    assert scaled < 0.9 * plain


def test_where_it_folds() -> None:
    graph = normed()
    assert [node.name for node in readers(graph, "n") or ()] == ["q", "k", "v"]
    assert readers(graph, "h1") is None  # added to
    assert [(path.value.name, path.output.name, path.repeats) for path in value_paths(graph)] == [("v", "o", 2)]
    assert readers(graph, "n2") is None  # the projection to the logits is the embedding


def test_without_formats_nothing_changes() -> None:
    source = graphs.model()
    assert Awq().run(source, Context()) is source


@pytest.mark.parametrize(("options", "message"), [({"experts": "bf16"}, "no integer format"), ({"grid": 0}, "grid=0")])
def test_wrong_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(MoecError, match=message):
        Awq(**options)  # type: ignore[arg-type]


def test_text_is_needed() -> None:
    with pytest.raises(MoecError, match="awq needs calibration text"):
        Awq(experts="int4_g32").run(graphs.model(), Context())
