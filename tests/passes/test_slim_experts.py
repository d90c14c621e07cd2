"""Narrower experts: exact where the neurons that go do nothing, refitted where they do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moec.compiler.errors import MoecError
from moec.compiler.model import Model
from moec.compiler.verify import verify
from moec.compiler.weights import MemoryWeights
from moec.passes.quantize import Quantize
from moec.passes.slim_experts import SlimExperts
from tests import graphs

UP, DOWN = "layers.0.experts.up", "layers.0.experts.down"


def test_neurons_that_add_nothing_go_without_a_trace() -> None:
    model = graphs.model()
    down = model.load(DOWN).clone()
    dead = torch.stack([torch.randperm(12, generator=torch.Generator().manual_seed(e))[:4] for e in range(6)])
    down.scatter_(2, dead[:, None].expand(-1, 16, -1), 0.0)
    assert isinstance(model.weights, MemoryWeights)
    model = replace(model, weights=MemoryWeights({**model.weights.tensors, DOWN: down}))
    slim = SlimExperts(width=8, multiple=4).run(model, graphs.context(model))
    verify(slim.graph)
    assert slim.graph.params[UP].type.shape == (6, 16, 16)
    assert slim.graph.params[DOWN].type.shape == (6, 16, 8)
    torch.testing.assert_close(graphs.logits(slim), graphs.logits(model), rtol=1e-5, atol=1e-5)


def test_refitting_is_closer_to_the_layer_than_cutting() -> None:
    model = graphs.model()
    context = graphs.context(model)
    errors = []
    for repair in (False, True):
        slim = SlimExperts(width=0.5, multiple=2, repair=repair, ridge=1e-3).run(model, context)
        errors.append(float((_outputs(slim, context.need_text("").ids) - _outputs(model, context.need_text("").ids)).square().mean()))
    assert errors[1] < 0.8 * errors[0]


def _outputs(model: Model, ids: torch.Tensor) -> torch.Tensor:
    """What the layer adds to the residual stream: the logits before the norm are linear in it."""
    from moec.compiler.interpreter import Interpreter

    graph = replace(model.graph, outputs=("e",))
    return Interpreter(graph, model.weights)(ids=ids, positions=torch.arange(ids.shape[1]).expand(ids.shape))[0]


@pytest.mark.parametrize("importance", ["output", "activation", "weight"])
def test_layers_share_what_there_is(importance: str) -> None:
    model = graphs.model()
    slim = SlimExperts(width=0.67, importance=importance, allocation="model", multiple=4, repair=False).run(model, graphs.context(model))
    assert slim.graph.params[DOWN].type.shape == (6, 16, 8)


def test_bad_options() -> None:
    model = graphs.model()
    with pytest.raises(MoecError, match="did you mean 'output'"):
        SlimExperts(importance="ouput")
    with pytest.raises(MoecError, match="width 1.5"):
        SlimExperts(width=1.5)
    with pytest.raises(MoecError, match="more than the experts have"):
        SlimExperts(width=99).run(model, graphs.context(model))
    with pytest.raises(MoecError, match="put slim_experts before"):
        SlimExperts(width=4, multiple=4).run(Quantize(experts="int4_g32").run(model, graphs.context(model)), graphs.context(model))
