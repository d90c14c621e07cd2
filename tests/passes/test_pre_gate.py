"""pre_gate: an early router that can know the later one does, recall is what is measured, and routing follows it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from moec.compiler.errors import MoecError
from moec.compiler.model import Model
from moec.compiler.verify import verify
from moec.compiler.weights import MemoryWeights
from moec.passes.pre_gate import PreGate, descend, fit_ridge
from tests import graphs
from tests.passes.routing_models import model, routing

IDS = graphs.text().ids


def knowable() -> Model:
    """A model whose first layer and second attention add nothing, so that both routers read the same."""
    subject = model()
    assert isinstance(subject.weights, MemoryWeights)
    still = {n: torch.zeros_like(t) for n, t in subject.weights.tensors.items() if n in ("layers.0.experts.down", "layers.1.o.weight")}
    return Model(subject.graph, MemoryWeights({**subject.weights.tensors, **still}))


def test_a_router_that_can_be_known_early() -> None:
    subject = knowable()
    context = graphs.context(subject)
    changed = PreGate(mode="replace", ridge=1e-6, steps=0).run(subject, context)
    verify(changed.graph)
    names = [n.name for n in changed.graph.nodes]
    assert names.index("logits_b") < names.index("e")  # known before the layer before runs
    assert context.journal[-1]["recall"]["e_b"]["ridge"] > 0.98
    torch.testing.assert_close(graphs.logits(changed), graphs.logits(subject), rtol=1e-2, atol=1e-3)


def test_routing_follows_the_early_router() -> None:
    subject = model()
    context = graphs.context(subject)
    changed = PreGate(mode="replace", steps=20).run(subject, context)
    verify(changed.graph)
    found = routing(changed, IDS)
    weight, bias = (changed.load(name) for name in changed.graph.producers["logits_b"].inputs[1:])
    chosen = (found.x["e"] @ weight.T + bias).topk(3).indices
    assert torch.equal(chosen.sort().values, found.ids["e_b"].sort().values)
    assert torch.equal(found.ids["e"], routing(subject, IDS).ids["e"])  # the first layer keeps its own router


def test_predict_changes_nothing_and_writes_a_file(tmp_path: Path) -> None:
    subject = model()
    context = graphs.context(subject)
    assert PreGate(mode="predict", save=str(tmp_path / "early.safetensors")).run(subject, context) is subject
    recall = context.journal[-1]["recall"]["e_b"]
    assert all(0 <= value <= 1 for value in recall.values())
    with safe_open(tmp_path / "early.safetensors", framework="pt") as file:
        assert file.get_tensor("e_b.weight").shape == (6, 16)
        assert file.get_tensor("e_b.bias").shape == (6,)
        assert json.loads(file.metadata()["recall"])["e_b"] == recall
    assert [p.name for p in tmp_path.iterdir()] == ["early.safetensors"]


def test_descent_lowers_the_cross_entropy() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(500, 8, generator=draw)
    logits = torch.tanh(x @ torch.randn(8, 6, generator=draw)) * 4

    def loss(pair: tuple[torch.Tensor, torch.Tensor]) -> float:
        return float(-(logits.softmax(-1) * (x @ pair[0].T + pair[1]).log_softmax(-1)).sum(-1).mean())

    ridge = fit_ridge(x, logits, 1e-3)
    assert loss(descend(x, logits, ridge, steps=50, seed=0)) < loss(ridge)
    torch.testing.assert_close(
        fit_ridge(x, x @ logits[:6, :].T[:, :1].repeat(2, 1)[:8] + 3, 1e-8)[1], torch.full((1,), 3.0), rtol=1e-3, atol=1e-3
    )


def test_mistakes(tmp_path: Path) -> None:
    for options, message in (
        ({"mode": "guess"}, "none of predict"),
        ({"ridge": 0}, "ridge"),
        ({"save": str(tmp_path / "a/b")}, "does not exist"),
    ):
        with pytest.raises(MoecError, match=message):
            PreGate(**options)
    with pytest.raises(MoecError, match="one MoE layer"):
        PreGate(mode="predict").run(graphs.model(), graphs.context(graphs.model()))
