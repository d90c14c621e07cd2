"""Merging experts: exact where members are the same function."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moec.compiler.context import Context
from moec.compiler.errors import MoecError
from moec.compiler.layers import moe_layers
from moec.compiler.model import Model
from moec.compiler.passes import make_pass
from moec.compiler.verify import verify
from moec.compiler.weights import constant
from moec.passes.criteria import views
from moec.passes.merge_experts import MergeExperts, _merged
from moec.passes.merging import get_method, known_methods
from tests import graphs

GATE, UP, DOWN = "layers.0.gate.weight", "layers.0.experts.up", "layers.0.experts.down"


def twins(seed: int, *, shuffled: bool, same_rows: bool) -> tuple[Model, list[set[int]]]:
    """A model in which three experts are copies of others (their neurons in another order), and the pairs."""
    model = graphs.model(seed)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(6, generator=generator).tolist()
    gate, up, down = (model.load(name).clone() for name in (GATE, UP, DOWN))
    for first, second in zip(order[:3], order[3:], strict=True):
        neurons = torch.randperm(12, generator=generator) if shuffled else torch.arange(12)
        up[second] = torch.cat([half[neurons] for half in up[first].chunk(2)])
        down[second] = down[first][:, neurons]
        if same_rows:
            gate[second] = gate[first]
    edits = {GATE: constant(gate), UP: constant(up), DOWN: constant(down)}
    return model.edited(model.graph, edits), [set(pair) for pair in zip(order[:3], order[3:], strict=True)]


def groups_of(context: Context) -> list[set[int]]:
    (groups,) = context.journal[-1]["groups"].values()
    return [set(group) for group in groups]


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)  # merged weights are float32


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 999))
def test_clusters_of_equal_experts_are_exact(seed: int) -> None:
    model, pairs = twins(seed, shuffled=False, same_rows=False)
    context = graphs.context(model)
    merged = MergeExperts("hc_smoe", keep=3).run(model, context)
    verify(merged.graph)
    assert sorted(map(sorted, groups_of(context))) == sorted(map(sorted, pairs))
    assert moe_layers(merged.graph)[0].count == 3
    close(graphs.logits(merged), graphs.logits(model))


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 999))
def test_neurons_are_matched_before_they_are_averaged(seed: int) -> None:
    model, pairs = twins(seed, shuffled=True, same_rows=False)
    (look,) = views(model, moe_layers(model.graph), ("statistics",), graphs.context(model), "test")
    merged = _merged(model, model, look, [sorted(pair) for pair in pairs], align=True)
    close(graphs.logits(merged), graphs.logits(model))
    apart = _merged(model, model, look, [sorted(pair) for pair in pairs], align=False)
    assert (graphs.logits(apart) - graphs.logits(model)).abs().max() > 1e-3


def test_groups_around_the_most_used_by_hand() -> None:
    model = graphs.model()
    (look,) = views(model, moe_layers(model.graph), ("statistics",), graphs.context(model), "test")
    logits = torch.tensor([[1.0, 2, 0, -1, 0, 3], [0, 0.1, 1, 0, 2, 0], [2, 4, 0, 1, 0.1, -1]]).double()  # 3 tokens
    known = replace(look.statistics, count=torch.tensor([5, 9, 1, 0, 8, 7]), logit_moment=logits.T @ logits)
    # 1, 4 and 5 are used most; the logits of 0 are those of 1 halved, of 2 those of 4, and of 3 minus those of 5, so nearer to 1.
    assert get_method("m_smoe").group(replace(look, known=known), 3) == [[1, 0, 3], [4, 2], [5]]


def test_members_count_by_how_often_they_are_used() -> None:
    model = graphs.model()
    context = graphs.context(model)
    merged = MergeExperts("hc_smoe", keep=2).run(model, context)
    use = context.statistics(model, "test").layer("e").count.double()
    (groups,) = context.journal[-1]["groups"].values()
    up = model.load(UP).double()
    for at, group in enumerate(groups):
        expected = (use[group, None, None] * up[group]).sum(0) / use[group].sum()
        torch.testing.assert_close(merged.load(UP, at).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", known_methods())
@pytest.mark.parametrize("budget", ["per_layer", "global"])
def test_every_method_with_every_budget(method: str, budget: str) -> None:
    model = graphs.model(5)
    merged = MergeExperts(method, keep=4, budget=budget).run(model, graphs.context(model))
    verify(merged.graph)
    assert moe_layers(merged.graph)[0].count == 4
    assert merged.graph.params[GATE].type.shape == (6, 16)  # the router keeps all rows
    assert torch.isfinite(graphs.logits(merged)).all()


def test_errors() -> None:
    model = graphs.model()
    with pytest.raises(MoecError, match="unknown method of merging 'hcsmoe': did you mean 'hc_smoe'"):
        make_pass("merge_experts", {"method": "hcsmoe"})
    with pytest.raises(MoecError, match="did you mean 'global'"):
        make_pass("merge_experts", {"budget": "globl"})
    with pytest.raises(MoecError, match="keep is 7, and %e has 6 experts"):
        MergeExperts(keep=7).run(model, graphs.context(model))
    with pytest.raises(MoecError, match="merge_experts with the method hc_smoe needs calibration text"):
        MergeExperts(keep=3).run(model, Context())
    context = graphs.context(model)
    merged = MergeExperts(keep=3).run(model, context)
    with pytest.raises(MoecError, match="do it in one pass"):
        MergeExperts(keep=2).run(merged, context)
