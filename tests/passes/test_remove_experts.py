"""Removing experts: how many, in which steps, and where it stops."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.compiler.calibration.text import Text
from moec.compiler.context import Context
from moec.compiler.errors import MoecError
from moec.compiler.frontend import huggingface
from moec.compiler.ir import Graph, Param, TensorType
from moec.compiler.layers import moe_layers
from moec.compiler.model import Model
from moec.compiler.passes import make_pass
from moec.compiler.verify import verify
from moec.compiler.weights import Edited, constant
from moec.passes.removal.budgets import at_step, counts_by_importance, global_counts
from moec.passes.remove_experts import RemoveExperts
from tests import graphs


@pytest.fixture(scope="module")
def tiny() -> tuple[Model, Context]:
    """The small trained model with random text."""
    model = Model(*huggingface.load("examples/models/tiny-moe"))
    ids = torch.randint(0, 4096, (6, 33), generator=torch.Generator().manual_seed(0))
    return model, Context(text=Text(ids[:4, :-1], (0, 0, 0, 0), ("a",), ids[4:]), reference=model)


def counts(model: Model) -> list[int]:
    return [layer.count for layer in moe_layers(model.graph)]


def unnormalized(model: Model) -> Model:
    """The model with a router that leaves the shares of the softmax as they are."""
    nodes = [type(n)(n.op, n.inputs, n.outputs, {**n.attrs, "normalize": False}) if n.op == "router" else n for n in model.graph.nodes]
    return Model(model.graph.with_nodes(nodes), model.weights)


def test_rows_are_sliced_or_masked_as_the_router_needs_it() -> None:
    model = graphs.model()
    for subject, how, rows in ((model, "slice", 4), (unnormalized(model), "mask", 6)):
        context = graphs.context(subject)
        found = RemoveExperts(keep=4).run(subject, context)
        verify(found.graph)
        assert counts(found) == [4] and found.graph.params["layers.0.gate.weight"].type.shape[0] == rows
        note = context.journal[-1]
        assert note["router"] == [how] and note["scores_unchanged"] and note["steps"][0]["kl_divergence"] > 0
    context = graphs.context(subject)
    RemoveExperts(keep=4, router="slice").run(subject, context)
    assert context.journal[-1]["scores_unchanged"] is False


def test_an_expert_that_nothing_chooses_is_not_missed() -> None:
    model = graphs.model()
    bias = torch.zeros(6)
    bias[2] = -100.0
    graph = model.graph
    nodes = [type(n)(n.op, (n.inputs[0], "bias"), n.outputs, n.attrs) if n.op == "router" else n for n in graph.nodes]
    graph = graph.with_params([Param("bias", TensorType("f32", (6,)), "f32")]).with_nodes(nodes)
    model = Model(graph, Edited(model.weights, {"bias": constant(bias)}))
    for criterion in ("reap", "frequency", "naee"):
        found = RemoveExperts(criterion=criterion, keep=5).run(model, graphs.context(model))
        assert counts(found) == [5]
        torch.testing.assert_close(graphs.logits(found), graphs.logits(model))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"keep": 0.5}, [4, 4, 4, 4]), ({"keep": 8}, [8, 8, 8, 8]), ({"keep": 3, "criterion": "random"}, [3, 3, 3, 3]),
        ({"keep": 0.75, "criterion": "router_norm"}, [6, 6, 6, 6]),
    ],
)  # fmt: skip
def test_counts(tiny: tuple[Model, Context], options: dict[str, Any], expected: list[int]) -> None:
    assert counts(RemoveExperts(**options).run(*tiny)) == expected


@pytest.mark.parametrize("budget", ["global", "moe_i2"])
def test_uneven_budgets_keep_as_many_in_all(tiny: tuple[Model, Context], budget: str) -> None:
    found = RemoveExperts(keep=5, budget=budget).run(*tiny)
    verify(found.graph)
    assert sum(counts(found)) == 20 and min(counts(found)) >= 2


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(0.01, 100), min_size=4, max_size=4), st.integers(2, 8), st.integers(0, 99))
def test_budgets_by_law(tiny: tuple[Model, Context], matter: list[float], keep: int, seed: int) -> None:
    layers = moe_layers(tiny[0].graph)
    even = [keep] * 4
    found = counts_by_importance(matter, layers, even)
    assert sum(found) == 4 * keep and all(2 <= n <= 8 for n in found)
    order = sorted(range(4), key=lambda i: matter[i])
    assert all(found[a] <= found[b] or matter[a] == matter[b] for a, b in pairwise(order))
    scores = list(torch.rand(4, 8, generator=torch.Generator().manual_seed(seed)).double())
    shared = global_counts(scores, layers, even)
    assert sum(shared) == 4 * keep and all(2 <= n <= 8 for n in shared)
    assert at_step(layers, found, 0.0) == [8] * 4 and at_step(layers, found, 1.0) == found


def test_it_stops_within_the_limit(tiny: tuple[Model, Context]) -> None:
    model, context = tiny
    RemoveExperts(keep=2, steps=6).run(model, context)
    trail = [step["kl_divergence"] for step in context.journal[-1]["steps"]]
    assert len(trail) == 6
    limit = (trail[1] + trail[2]) / 2 if trail[2] > max(trail[:2]) else max(trail[:2]) * 1.01
    found = RemoveExperts(keep=2, steps=6, max_kl=limit).run(model, context)
    note = context.journal[-1]
    assert context.damage(found, "test").kl_divergence <= limit
    assert note["stopped_by_limit"] and note["limit"] == limit and [len(kept) for kept in note["kept"].values()] == counts(found)
    assert RemoveExperts(keep=2, steps="layer", max_kl=1e-9).run(model, context) is model
    layerwise = RemoveExperts(keep=2, steps="layer", max_kl=max(trail)).run(model, context)
    assert context.damage(layerwise, "test").kl_divergence <= max(trail)


def test_errors(tiny: tuple[Model, Context]) -> None:
    model, context = tiny
    for options, message in (
        ({"keep": 0}, "expected a number of experts a layer"),
        ({"keep": True}, "expected a number of experts a layer"),
        ({"keep": 1.5}, "expected a number of experts a layer"),
        ({"budget": "gobal"}, "did you mean 'global'"),
        ({"router": "slise"}, "did you mean 'slice'"),
        ({"criterion": "naee", "budget": "global"}, "naee chooses them together"),
        ({"steps": "layers"}, "expected a number of steps from 1, or `layer`"),
        ({"max_kl": 0.0}, "expected more than 0"),
        ({"options": {"a": 1}}, "the criterion reap has no options"),
    ):
        with pytest.raises(MoecError, match=message):
            make_pass("remove_experts", options)
    with pytest.raises(MoecError, match=r"keep is 9, and %\S+ has 8 experts"):
        RemoveExperts(keep=9).run(model, context)
    with pytest.raises(MoecError, match=r"keep=1 leaves 1 experts of %\S+, which needs 2 for each token"):
        RemoveExperts(keep=1).run(model, context)
    with pytest.raises(MoecError, match="remove_experts with the criterion reap needs calibration text: add --calibration"):
        RemoveExperts(keep=4).run(model, Context())
    with pytest.raises(MoecError, match="needs the model before the passes"):
        RemoveExperts(criterion="random", keep=4, max_kl=0.1).run(model, Context(text=context.text))
    plain = Graph("plain", (), {}, (), ())
    with pytest.raises(MoecError, match="no Mixture-of-Experts layer"):
        RemoveExperts(keep=4).run(Model(plain, model.weights), context)
