"""zero_experts: shares of the softmax stay, removed experts are worth what they are said to be, the nearest are chosen."""

from __future__ import annotations

import pytest
import torch

from moec.compiler.errors import MoecError
from moec.compiler.interpreter import Interpreter
from moec.compiler.model import Model
from moec.compiler.passes import Pass, run_passes
from moec.compiler.verify import verify
from moec.passes.routing.free_experts import KINDS, Worth
from moec.passes.routing.observe import Block, each_block
from moec.passes.skip_experts import SkipExperts
from moec.passes.zero_experts import ZeroExperts
from tests import graphs
from tests.passes.routing_models import model, routing

IDS = graphs.text().ids
REMOVED = {0: [1, 4], 1: [0]}


def blocks(subject: Model) -> dict[str, Block]:
    """The MoE layers of a model on calibration text."""
    found: dict[str, Block] = {}
    context = graphs.context(subject)
    each_block(subject, graphs.text(), lambda b: found.update({b.layer.name: b}), context.progress, "test")
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_by_hand(kind: str) -> None:
    subject = model(normalize=False)
    changed = ZeroExperts(experts=REMOVED, kind=kind).run(subject, graphs.context(subject))
    verify(changed.graph)
    assert changed.graph.params["layers.0.experts.up"].type.shape == (4, 24, 16)
    block = blocks(subject)["e"]
    expected = torch.zeros_like(block.x)
    for expert in range(6):
        token, slot = torch.where(block.ids == expert)
        g, x, f = block.weights[token, slot, None], block.x[token], block.slots[token, slot] / block.weights[token, slot, None]
        if expert in REMOVED[0]:
            square = g.square()
            mean, centre = (square * f).sum(0) / square.sum(), (square * x).sum(0) / square.sum()
            scale = (square * (x - centre) * (f - mean)).sum() / (square * (x - centre).square()).sum()
            f = {"zero": 0 * f, "copy": x, "constant": mean + 0 * f, "mixed": mean + scale * (x - centre)}[kind]
        expected.index_add_(0, token, g * f)
    graph = changed.graph.with_nodes(changed.graph.nodes, ["e"])
    positions = torch.arange(IDS.shape[1]).expand(len(IDS), -1)
    found = Interpreter(graph, changed.weights)(ids=IDS, positions=positions)[0].flatten(0, 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_errors_are_those_of_the_layer() -> None:
    block = blocks(model())["e"]
    worth, whole = Worth.of(block), block.slots.sum(1)
    stream = float((block.residual + whole).square().sum())
    for kind in KINDS:
        for expert in range(6):
            token, slot = torch.where(block.ids == expert)
            fit = worth.fit(expert, kind)
            g = block.weights[token, slot, None]
            instead = g * (fit.scale * block.x[token] + (0 if fit.value is None else fit.value))
            error = float((block.slots[token, slot] - instead).square().sum()) / stream
            assert worth.error(expert, kind) == pytest.approx(error, rel=1e-3)
    for expert in range(6):
        errors = [worth.error(expert, kind) for kind in ("zero", "constant", "mixed")]
        assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("per_layer", [True, False])
def test_a_fraction_takes_the_cheapest(per_layer: bool) -> None:
    subject = model()
    context = graphs.context(subject)
    changed = ZeroExperts(fraction=0.34, kind="constant", per_layer=per_layer).run(subject, context)
    verify(changed.graph)
    removed = context.journal[-1]["removed"]
    assert sum(map(len, removed.values())) == 4
    worth = {name: Worth.of(block) for name, block in blocks(subject).items()}
    for name, ids in removed.items():
        assert not per_layer or len(ids) == 2
        errors = [worth[name].error(e, "constant") for e in range(6)]
        assert sorted(ids) == sorted(sorted(range(6), key=errors.__getitem__)[: len(ids)])


def test_after_skipping() -> None:
    subject = model()
    steps: list[Pass] = [SkipExperts(rule="ratio", threshold=0.5), ZeroExperts(experts={0: [2]}, kind="copy")]
    changed = run_passes(subject, steps, graphs.context(subject))
    verify(changed.graph)
    skipped = routing(run_passes(subject, steps[:1], graphs.context(subject)), IDS).ids["e"]
    ids = next(iter(routing(changed, IDS).ids.values()))
    assert torch.equal(ids == 5, (skipped == 2) | (skipped == 6))


def test_mistakes() -> None:
    subject = model()
    for options, message in (
        ({"kind": "none"}, "none of zero"),
        ({"fraction": 1}, "between 0 and 1"),
        ({"fraction": 0.5, "experts": {0: [1]}}, "not both"),
    ):
        with pytest.raises(MoecError, match=message):
            ZeroExperts(**options)
    for experts, message in (({2: [0]}, "no MoE layer 2"), ({0: [6]}, "0 to 5"), ({0: [0, 1, 2, 3, 4, 5]}, "one must be kept")):
        with pytest.raises(MoecError, match=message):
            ZeroExperts(experts=experts).run(subject, graphs.context(subject))
