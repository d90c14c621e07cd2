"""Laws of surgery on MoE layers, each against the interpreter in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.compiler.errors import MoecError
from moec.compiler.layers import combine_experts, keep_experts, moe_layers
from moec.compiler.model import Model
from moec.compiler.verify import verify
from moec.compiler.weights import MemoryWeights
from moec.passes.quantize import Quantize
from moec.passes.skip_experts import SkipExperts
from tests import graphs

UP, DOWN, GATE = "layers.0.experts.up", "layers.0.experts.down", "layers.0.gate.weight"


def changed(model: Model, **tensors: torch.Tensor) -> Model:
    """A model with other values; dots in names are double underscores here."""
    assert isinstance(model.weights, MemoryWeights)
    return replace(model, weights=MemoryWeights({**model.weights.tensors, **{n.replace("__", "."): t for n, t in tensors.items()}}))


@settings(max_examples=15, deadline=None)
@given(order=st.permutations(range(6)), seed=st.integers(0, 99))
def test_permuting_experts_permutes_rows_and_nothing_else(order: list[int], seed: int) -> None:
    model = graphs.model(seed)
    found = keep_experts(model, moe_layers(model.graph)[0], order, "test")
    assert torch.equal(found.load(GATE), model.load(GATE)[order])
    torch.testing.assert_close(graphs.logits(found, seed), graphs.logits(model, seed), rtol=1e-12, atol=1e-12)


@settings(max_examples=15, deadline=None)
@given(gone=st.integers(0, 5), seed=st.integers(0, 99))
def test_an_expert_that_no_token_reaches_goes_without_a_trace(gone: int, seed: int) -> None:
    model = graphs.model(seed)
    graph = model.graph  # a bias of the choice keeps the expert from being chosen, whatever the token
    router = moe_layers(graph)[0].router
    bias = torch.zeros(6)
    bias[gone] = -1e9
    from moec.compiler.layers import add_constant

    model = add_constant(model, "bias", bias)
    nodes = [replace(n, inputs=(n.inputs[0], "bias")) if n is router else n for n in model.graph.nodes]
    model = Model(model.graph.with_nodes(nodes), model.weights)
    found = keep_experts(model, moe_layers(model.graph)[0], [e for e in range(6) if e != gone], "test")
    verify(found.graph)
    torch.testing.assert_close(graphs.logits(found, seed), graphs.logits(model, seed), rtol=1e-12, atol=1e-12)


@settings(max_examples=15, deadline=None)
@given(keep=st.lists(st.integers(0, 5), min_size=2, max_size=6, unique=True), seed=st.integers(0, 99))
def test_a_one_hot_matrix_is_a_choice_of_rows(keep: list[int], seed: int) -> None:
    model = graphs.model(seed)
    layer = moe_layers(model.graph)[0]
    matrix = torch.nn.functional.one_hot(torch.tensor(keep), 6).float()
    mapped, kept = combine_experts(model, layer, matrix, matrix, "test"), keep_experts(model, layer, keep, "test")
    assert torch.equal(graphs.logits(mapped, seed), graphs.logits(kept, seed))


@pytest.mark.parametrize("share", [0.5, 0.25])
def test_averaging_identical_experts_is_exact(share: float) -> None:
    model = graphs.model()
    up, down = model.load(UP).clone(), model.load(DOWN).clone()
    up[1], down[1] = up[0], down[0]
    model = changed(model, layers__0__experts__up=up, layers__0__experts__down=down)
    layer = moe_layers(model.graph)[0]
    merge, route = torch.eye(6), torch.eye(6)
    merge[0, :2] = torch.tensor([share, 1 - share])
    found = combine_experts(model, layer, merge, route, "test")
    torch.testing.assert_close(graphs.logits(found), graphs.logits(model), rtol=1e-5, atol=1e-5)


def test_removal_after_skipping_names_skipped_slots_anew() -> None:
    model = graphs.model()
    context = graphs.context(model)
    skipping = SkipExperts(rule="ratio", target=0.2).run(model, context)
    found = keep_experts(skipping, moe_layers(skipping.graph)[0], [5, 0, 3], "test")
    verify(found.graph)
    skips = [n.attrs["experts"] for n in found.graph.nodes if n.op == "skip"]
    assert skips == [3]
    removed = keep_experts(model, moe_layers(model.graph)[0], [5, 0, 3], "test")
    other = Model(removed.graph, removed.weights)
    assert found.graph.params[UP] == other.graph.params[UP]


def test_16_bits_are_the_identity() -> None:
    model = graphs.model()
    half = {name: value.bfloat16().float() for name, value in model.weights.tensors.items()}  # type: ignore[attr-defined]  # in memory
    model = Model(model.graph, MemoryWeights(half))
    found = Quantize(experts="bf16", linear="bf16", embedding="bf16", router="bf16").run(model, graphs.context(model))
    assert torch.equal(graphs.logits(found), graphs.logits(model))


def test_what_cannot_be_done() -> None:
    model = graphs.model()
    layer = moe_layers(model.graph)[0]
    with pytest.raises(MoecError, match="has 6 experts; 7 cannot be kept"):
        keep_experts(model, layer, range(7), "test")
    with pytest.raises(MoecError, match="chooses 2 experts a token and would have 1"):
        keep_experts(model, layer, [0], "test")
    mixed = replace(model.graph.params[UP], format=("f32", *("int4_g32",) * 5))
    with pytest.raises(MoecError, match="put test before"):
        keep_experts(Model(model.graph.with_params([mixed]), model.weights), layer, [0, 1, 2], "test")
