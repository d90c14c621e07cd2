"""Experts with low-rank factors: what they mean, and what surgery on layers makes of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.compiler.candidates import Candidates, Choice
from moec.compiler.errors import MoecError
from moec.compiler.factors import folded
from moec.compiler.layers import combine_experts, keep_experts, moe_layers
from moec.compiler.model import Model
from moec.compiler.plan import make_plan, param_bytes
from moec.compiler.recipe import NOTHING
from moec.compiler.regroup import map_experts, mask_experts
from moec.compiler.roles import parameter_roles
from moec.compiler.split_experts import split_experts, uniform_experts
from moec.compiler.stored import as_stored, pack
from moec.compiler.text import parse_graph, print_graph
from moec.compiler.verify import VerifyError, verify
from moec.compiler.weights import constant
from moec.passes.awq import Awq
from moec.passes.merge_experts import MergeExperts
from moec.passes.rotate import Rotate
from moec.passes.slim_experts import SlimExperts
from moec.passes.sparsify_experts import SparsifyExperts
from moec.passes.zero_experts import ZeroExperts
from moec.targets import get_target
from tests import graphs

UP, DOWN = "layers.0.experts.up", "layers.0.experts.down"
RANKS = [(3, 5), (4, 0), (0, 1), (16, 12)]


def dense(model: Model) -> Model:
    """The same function by whole matrices, made here."""
    layer = moe_layers(model.graph)[0]
    values = {name: model.load(name) for name in (UP, DOWN)}
    for name, (left, right) in layer.factors.items():
        values[name] = values[name] + model.load(left) @ model.load(right)
    return model.edited(graphs.moe(), {name: constant(value) for name, value in values.items()})


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("ranks", RANKS)
def test_an_expert_is_the_sum_of_its_matrix_and_its_factors(ranks: tuple[int, int], whole: bool) -> None:
    model = graphs.factored(graphs.model(), ranks, whole=whole)
    verify(model.graph)
    assert parse_graph(print_graph(model.graph)) == model.graph
    torch.testing.assert_close(graphs.logits(model), graphs.logits(dense(model)), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(graphs.logits(model), graphs.logits(graphs.model()), atol=1e-2)
    torch.testing.assert_close(graphs.logits(folded(model)), graphs.logits(model), rtol=1e-6, atol=1e-6)
    verify(folded(model).graph)
    assert folded(model).graph.nodes == graphs.moe().nodes
    assert all(p.format == "f32" for p in folded(model).graph.params.values())


def test_factors_that_do_not_fit() -> None:
    graph = graphs.factored(graphs.model()).graph
    left = graph.params[f"{UP}.left"]
    with pytest.raises(VerifyError, match="factors"):
        verify(graph.with_params([replace(left, type=replace(left.type, shape=(6, 24, 4)))]))
    nodes = [replace(n, inputs=(*n.inputs[:8], "", *n.inputs[9:])) if n.op == "experts" else n for n in graph.nodes]
    with pytest.raises(VerifyError, match="both or none"):
        verify(graph.with_nodes(nodes))


def test_bytes_and_roles() -> None:
    model = graphs.factored(graphs.model(), (3, 5), whole=False, fmt="bf16")
    found = {name: param_bytes(param) for name, param in model.graph.params.items() if ".experts." in name}
    assert found == {
        UP: 0, DOWN: 0, f"{UP}.left": 6 * 24 * 3 * 2, f"{UP}.right": 6 * 3 * 16 * 2, f"{DOWN}.left": 6 * 16 * 5 * 2,
        f"{DOWN}.right": 6 * 5 * 12 * 2,
    }  # fmt: skip
    assert {parameter_roles(model.graph)[name] for name in found} == {"experts"}
    plans = [make_plan(m.graph, NOTHING, get_target("cpu"), None) for m in (graphs.model(), model)]
    stored = [sum(r.parameters for r in plan.rows if r.role == "experts") for plan in plans]
    assert stored == [6 * (24 * 16 + 16 * 12), sum(found.values()) // 2]
    assert plans[0].bytes_per_token - plans[1].bytes_per_token == 2 * 4 * (24 * 16 + 16 * 12) - sum(found.values()) * 2 // 6


def test_a_weight_with_values_is_not_stored_as_zero() -> None:
    model = graphs.model()
    param = replace(model.graph.params[UP], format="zero")
    with pytest.raises(MoecError, match="cannot have the format zero"):
        pack(model.weights, param, 0)
    assert not as_stored(Model(model.graph.with_params([param]), model.weights)).load(UP).any()


@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(6)), seed=st.integers(0, 99), whole=st.booleans())
def test_permuting_experts(order: list[int], seed: int, whole: bool) -> None:
    model = graphs.factored(graphs.model(seed), seed=seed, whole=whole)
    found = keep_experts(model, moe_layers(model.graph)[0], order, "test")
    verify(found.graph)
    torch.testing.assert_close(graphs.logits(found, seed), graphs.logits(model, seed), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("surgery", [keep_experts, mask_experts])
def test_removal_is_that_of_whole_matrices(surgery: object) -> None:
    assert callable(surgery)
    model = graphs.factored(graphs.model())
    found, expected = (surgery(m, moe_layers(m.graph)[0], [4, 1, 5], "test") for m in (model, dense(model)))
    verify(found.graph)
    assert found.graph.params[f"{UP}.left"].type.shape == (3, 24, 3)
    torch.testing.assert_close(graphs.logits(found), graphs.logits(expected), rtol=1e-6, atol=1e-6)


def test_merging_is_that_of_whole_matrices() -> None:
    model = graphs.factored(graphs.model(), whole=False)
    merge = torch.rand(4, 6, generator=torch.Generator().manual_seed(1))
    found, expected = (map_experts(m, moe_layers(m.graph)[0], merge, merge, "test") for m in (model, dense(model)))
    verify(found.graph)
    torch.testing.assert_close(graphs.logits(found), graphs.logits(expected), rtol=1e-5, atol=1e-5)
    searched, wanted = (Candidates(m, torch.arange(8)[None]).logits([Choice(merge, merge)]) for m in (model, dense(model)))
    torch.testing.assert_close(searched, wanted, rtol=1e-4, atol=1e-4)
    averaged = MergeExperts(keep=3, method="hc_smoe").run(model, graphs.context(model))
    verify(averaged.graph)
    assert not moe_layers(averaged.graph)[0].factors
    with pytest.raises(MoecError, match="low-rank factors"):
        combine_experts(model, moe_layers(model.graph)[0], merge, merge, "test")


def test_free_experts_take_factors_along() -> None:
    model = graphs.factored(graphs.model())
    found, expected = (ZeroExperts(experts={0: [1, 4]}, kind="constant").run(m, graphs.context(m)) for m in (model, dense(model)))
    verify(found.graph)
    torch.testing.assert_close(graphs.logits(found), graphs.logits(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "step", [SlimExperts(width=6, multiple=2), SparsifyExperts(sparsity=0.5), Awq(experts="int4_g32"), Rotate(residual=True)]
)
def test_passes_that_change_whole_matrices_come_first(step: object) -> None:
    model = graphs.factored(graphs.model())
    with pytest.raises(MoecError, match="low-rank factors; put"):
        step.run(model, graphs.context(model))  # type: ignore[attr-defined]  # a pass


def test_statistics_are_those_of_whole_matrices() -> None:
    model = graphs.factored(graphs.model())
    found, expected = (graphs.context(m).statistics(m, "test").layer("e") for m in (model, dense(model)))
    torch.testing.assert_close(found.weighted_hidden, expected.weighted_hidden, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.output, expected.output, rtol=1e-4, atol=1e-4)


def test_mixed_formats_are_split_with_their_factors() -> None:
    model = graphs.factored(graphs.model())
    up, left = (model.graph.params[name] for name in (UP, f"{UP}.left"))
    formats = ("f32", "int4_g32", "f32", "f32", "int4_g32", "f32")
    changed = [replace(up, format=formats), replace(left, format=("f32", *["int8_channel"] * 5))]
    mixed = Model(model.graph.with_params(changed), model.weights)
    split = uniform_experts(mixed)
    verify(split.graph)
    assert sum(n.op == "experts" for n in split.graph.nodes) == 3
    torch.testing.assert_close(graphs.logits(split), graphs.logits(model), rtol=1e-6, atol=1e-6)
    assert sum(param_bytes(p) for p in split.graph.params.values() if p.type.dtype == "f32") == sum(
        param_bytes(p) for p in mixed.graph.params.values()
    )


def test_layers_split_twice_are_found() -> None:
    model = graphs.model()
    for groups in ([[0, 2, 4], [1, 3, 5]], [[0, 2], [1]]):
        node = next(n for n in model.graph.nodes if n.op == "experts")
        model = split_experts(model, node, groups)
    assert [layer.count for layer in moe_layers(model.graph)] == [2, 1, 3]
    context = graphs.context(model)
    assert len(context.statistics(model, "test").layers) == 3
