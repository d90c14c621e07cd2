"""The fast evaluation of candidates against the models that they stand for."""

from __future__ import annotations

import pytest
import torch

from moec.compiler.calibration.text import Text
from moec.compiler.candidates import Candidates, Choice
from moec.compiler.damage import each_logits
from moec.compiler.errors import MoecError
from moec.compiler.frontend import huggingface
from moec.compiler.layers import keep_experts, moe_layers
from moec.compiler.model import Model
from moec.compiler.regroup import map_experts, mask_experts

IDS = torch.randint(0, 4096, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(*huggingface.load("examples/models/tiny-moe"))


def logits(model: Model) -> torch.Tensor:
    found: list[torch.Tensor] = []
    each_logits(model, IDS, lambda _, part: found.append(part))
    return torch.cat(found)


def draw(seed: int, *, mixed: bool) -> list[Choice | None]:
    """A choice a layer; the second layer stays as it is."""
    generator = torch.Generator().manual_seed(seed)
    choices: list[Choice | None] = []
    for _ in range(4):
        merge = torch.eye(8)[torch.randperm(8, generator=generator)[:5]]
        route = merge
        if mixed:
            merge, route = (merge + 0.1 * torch.randn(5, 8, generator=generator) for _ in range(2))
        choices.append(Choice(merge, route))
    choices[1] = None
    return choices


def applied(model: Model, choices: list[Choice | None], *, mask: bool = False) -> Model:
    for at, choice in enumerate(choices):
        layer = moe_layers(model.graph)[at]
        if choice is None:
            continue
        if choice.kept is None:
            model = map_experts(model, layer, choice.merge, choice.route, "test")
        else:
            model = (mask_experts if mask else keep_experts)(model, layer, choice.kept, "test")
    return model


def test_candidates_are_the_models_they_stand_for(model: Model) -> None:
    candidates = Candidates(model, IDS)
    first, second = draw(1, mixed=False), draw(2, mixed=True)
    shared = [*first[:2], *second[2:]]  # begins as the first one does
    unchanged: list[Choice | None] = [None] * 4
    for choices in (first, second, shared, first, unchanged):
        torch.testing.assert_close(candidates.logits(choices), logits(applied(model, choices)), rtol=1e-4, atol=1e-4)


def test_routers_whose_weights_are_not_normalised(model: Model) -> None:
    nodes = [n if n.op != "router" else type(n)(n.op, n.inputs, n.outputs, {**n.attrs, "normalize": False}) for n in model.graph.nodes]
    plain = Model(model.graph.with_nodes(nodes), model.weights)
    candidates = Candidates(plain, IDS)
    for choices in (draw(1, mixed=False), draw(2, mixed=True)):
        torch.testing.assert_close(candidates.logits(choices), logits(applied(plain, choices, mask=True)), rtol=1e-4, atol=1e-4)


def test_wrong_choices(model: Model) -> None:
    with pytest.raises(MoecError, match="1 choices for a model of 4"):
        Candidates(model, IDS).logits([None])
    masked = mask_experts(model, moe_layers(model.graph)[0], range(4), "test")
    with pytest.raises(MoecError, match="more rows than there are experts"):
        Candidates(masked, IDS)


def test_a_sample_has_little_of_all_text() -> None:
    text = Text(torch.arange(8 * 300).view(8, 300), tuple(range(8)), tuple("abcdefgh"), torch.zeros(1, 301, dtype=torch.int64))
    part = text.sample(512)
    assert (part.ids.shape, part.domain) == ((4, 128), (0, 2, 5, 7))
    assert torch.equal(part.ids[1], text.ids[2, :128])
