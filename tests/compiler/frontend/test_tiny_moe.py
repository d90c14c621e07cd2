"""The checkpoint that ships with the examples: loaded, in normal form, and equal to transformers' own eager execution."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from moec.compiler.core_aten import unknown_ops
from moec.compiler.frontend.huggingface import load
from moec.compiler.interpreter import Interpreter
from moec.compiler.ir import Graph
from moec.compiler.text import parse_graph, print_graph
from moec.compiler.weights import WeightSource

TINY = Path(__file__).parents[3] / "examples" / "models" / "tiny-moe"


@pytest.fixture(scope="module")
def loaded() -> tuple[Graph, WeightSource]:
    return load(TINY)


def test_normal_form(loaded: tuple[Graph, WeightSource]) -> None:
    graph, _ = loaded
    ops = Counter(n.op for n in graph.nodes)
    # 4 layers: q, k, v, o and the router's projection each, and the language model head
    assert (ops["attention"], ops["router"], ops["experts"], ops["rope"], ops["linear"]) == (4, 4, 4, 8, 21)
    assert ops["rms_norm"] == 4 * 4 + 1  # input, attention output, q and k in each layer; the last
    assert not ops["aten.permute.default"] and not list(unknown_ops(graph))
    assert [str(graph.type_of(n.inputs[0])) for n in graph.nodes if n.op == "experts"] == ["f32[B, T, 192]"] * 4
    assert graph.symbols == ("B", "T") and str(graph.type_of(graph.outputs[0])) == "f32[B, T, 4096]"
    assert {p.format for p in graph.params.values() if "inv_freq" not in p.name} == {"bf16"}
    assert graph.meta["tied_embeddings"] and graph.meta["experts"] == 8 and graph.meta["moe"]


def test_text_round_trip(loaded: tuple[Graph, WeightSource]) -> None:
    text = print_graph(loaded[0])
    assert print_graph(parse_graph(text)) == text


@pytest.mark.parametrize(("batch", "tokens"), [(1, 5), (2, 13), (1, 1)])
def test_logits_are_those_of_transformers(loaded: tuple[Graph, WeightSource], batch: int, tokens: int) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    ids = torch.randint(0, 4096, (batch, tokens), generator=torch.Generator().manual_seed(tokens))
    (logits,) = Interpreter(*loaded)(ids=ids, positions=torch.arange(tokens).expand(batch, -1))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    assert (logits - expected).abs().max() < 1e-4


def test_one_expert_is_read_alone(loaded: tuple[Graph, WeightSource]) -> None:
    _, weights = loaded
    for name in ("model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"):
        whole = weights.load(name)
        assert whole.dtype == torch.bfloat16
        assert all(torch.equal(weights.load(name, e), whole[e]) for e in range(8))
