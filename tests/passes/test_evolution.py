"""What is ours in the search: the climb by exchanges and the descent, against closed forms, and that both go on where they were."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moec.compiler.candidates import Candidates, Choice
from moec.compiler.errors import MoecError
from moec.compiler.layers import moe_layers
from moec.compiler.passes import make_pass
from moec.compiler.progress import Progress
from moec.compiler.verify import verify
from moec.passes.eep import Eep
from moec.passes.evolution import fitness
from moec.passes.evolution.climb import Climb, candidate_of, kept_of
from moec.passes.evolution.genes import Candidate
from moec.passes.evolution.measure import on_task, on_text
from moec.passes.evolution.refine import MEASURED, Descent, Loss, Refine
from tests import graphs, tiny

QUIET = Progress(quiet=True)
REFINED: dict[str, Any] = {"keep": 3, "initial": 1, "start": ["frequency"], "prune_steps": 0, "merge_steps": 0, "tokens": 64}


def value_of(values: np.ndarray, candidate: Candidate) -> float:
    return float(sum(values[g, e] for g, kept in enumerate(kept_of(candidate)) for e in kept))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 9999), free=st.booleans())
def test_a_climb_reaches_the_best_where_experts_add_up(seed: int, free: bool) -> None:
    rng = np.random.default_rng(seed)
    values, keep = rng.normal(size=(3, 7)), 3
    start = candidate_of(tuple(frozenset(rng.permutation(7)[:keep].tolist()) for _ in range(3)), [7] * 3)
    climb = Climb([7] * 3, lambda c: value_of(values, c), 2000, [1] * 3 if free else None)
    found = climb.run([start], QUIET)
    assert climb.trail == sorted(climb.trail) and found.fitness == climb.trail[-1] == pytest.approx(value_of(values, found))
    kept = kept_of(found)
    assert sum(map(len, kept)) == 9 and min(map(len, kept)) >= 1
    if not free:
        assert all(kept[g] == set(np.argsort(-values[g])[:keep].tolist()) for g in range(3))
        return
    first = values.max(1)  # each group keeps its best one, and then the best of all
    rest = np.sort(np.concatenate([np.sort(row)[:-1] for row in values]))[::-1][:6]
    assert found.fitness == pytest.approx(float(first.sum() + rest.sum()))


def test_a_climb_goes_the_same_way_again(tmp_path: Path) -> None:
    values, calls = np.random.default_rng(0).normal(size=(2, 6)), [0]

    def worth(candidate: Candidate) -> float:
        calls[0] += 1
        return value_of(values, candidate) + 0.3 * len({len(k & {0, 1}) for k in kept_of(candidate)})

    def climb(evaluations: int, file: Path | None, identity: str = "a") -> tuple[Candidate, list[float]]:
        starts = [candidate_of((frozenset(s), frozenset(s)), [6, 6]) for s in ({0, 1, 2}, {3, 4, 5})]
        one = Climb([6, 6], worth, evaluations, [1, 1], file, identity)
        return one.run(starts, QUIET), one.trail

    whole, trail = climb(60, None)
    assert calls[0] <= 60
    file = tmp_path / "climb.json"
    climb(20, file)
    calls[0] = 0
    again, resumed = climb(60, file)
    assert calls[0] <= 40 and resumed == trail and kept_of(again) == kept_of(whole)
    calls[0] = 0
    climb(60, file)
    assert calls[0] == 0
    climb(5, file, "b")
    assert calls[0] == 5  # what another climb kept says nothing
    file.write_text("{}")
    with pytest.raises(MoecError, match="not what a search keeps"):
        climb(5, file)


def quadratic(goal: Tensor) -> Loss:
    def loss(merge: Sequence[Tensor], route: Sequence[Tensor], rows: Tensor) -> Tensor:
        noise = torch.stack([torch.randn(goal.shape, generator=torch.Generator().manual_seed(int(r))) for r in rows]).mean(0)
        return ((merge[0] - goal - 0.01 * noise) ** 2).sum() + ((route[0] - goal) ** 2).sum()

    return loss


def test_a_descent_finds_the_bottom_and_goes_on_where_it_was(tmp_path: Path) -> None:
    goal = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))
    start = candidate_of((frozenset({0, 2}),), [4])

    def distance(candidate: Candidate) -> float:
        return -float(sum(((m - goal.numpy()) ** 2).sum() for m in (*candidate.merge, *candidate.route)))

    class StoppedError(Exception):
        """In the middle."""

    def descent(file: Path | None, stop: int | None = None) -> tuple[Candidate, list[float]]:
        measured = [0]

        def worth(candidate: Candidate) -> float:
            measured[0] += 1
            if measured[0] == stop:
                raise StoppedError
            return distance(candidate)

        one = Descent(quadratic(goal), 10, 3, worth, Refine(400, 0.05, merging=1.0), 3, file, "x")
        return one.run(Candidate(start.merge, start.route, distance(start)), QUIET), one.losses

    whole, losses = descent(None)
    assert whole.fitness > -1e-2 and losses[-1] < 1e-2 and len(losses) == 400
    file = tmp_path / "refine.safetensors"
    with pytest.raises(StoppedError):
        descent(file, stop=MEASURED // 2)
    again, resumed = descent(file)
    assert resumed == losses and again.fitness == whole.fitness
    assert all(np.array_equal(a, b) for a, b in zip((*again.merge, *again.route), (*whole.merge, *whole.route), strict=True))
    file.write_bytes(b"nothing")
    with pytest.raises(MoecError, match="not what a search keeps"):
        descent(file)


def test_a_descent_that_only_harms_changes_nothing() -> None:
    start = candidate_of((frozenset({0, 2}),), [4], 1.0)
    one = Descent(quadratic(torch.ones(2, 4)), 10, 3, lambda _: 0.5, Refine(20, 0.1))
    assert one.run(start, QUIET) is start


@pytest.mark.parametrize("measure", ["kl", "perplexity"])
def test_refined_experts_are_not_worse_on_what_they_are_searched_on(measure: str) -> None:
    model = graphs.model()
    context = graphs.context(model)
    found = Eep(**REFINED, climb=40, fitness=measure, refine={"steps": 24, "rate": 0.02, "merging": 1.0, "tokens": 48}).run(model, context)
    verify(found.graph)
    note = context.journal[-1]
    trail, losses = note["fitness_by_evaluation"], note["refine_losses"]
    assert trail == sorted(trail) and trail[-1] > trail[-2] and len(losses) == 24
    ids = context.need_text("test").sample(64).ids
    logits = [graphs_logits(m, ids) for m in (model, found)]
    of = fitness.of_distance(logits[0]) if measure == "kl" else fitness.of_text(ids, logits[0])
    assert of(logits[1]) == pytest.approx(trail[-1], abs=0.02)


def graphs_logits(model: Any, ids: Tensor) -> Tensor:
    from moec.compiler.damage import each_logits

    parts: list[Tensor] = []
    each_logits(model, ids, lambda _, part: parts.append(part))
    return torch.cat(parts)


def test_a_whole_search_goes_on_where_it_was(tmp_path: Path) -> None:
    model, notes = graphs.model(), []
    for work in (tmp_path, tmp_path, None):
        context = graphs.context(model)
        context.work = work
        Eep(**{**REFINED, "merge_steps": 6}, climb=30, refine={"steps": 9}).run(model, context)
        notes.append({k: context.journal[-1][k] for k in ("fitness_by_evaluation", "refine_losses", "merge", "route")})
    assert notes[0] == notes[1] == notes[2]
    assert len(list(tmp_path.glob("eep-*"))) == 3


def test_places_can_go_from_layer_to_layer() -> None:
    model = tiny.model()
    context = graphs.context(model)
    found = Eep(keep=2, initial=1, phase="prune", groups=0, prune_steps=0, tokens=64, climb=90, budget="global").run(model, context)
    verify(found.graph)
    layers = moe_layers(found.graph)
    counts = [layer.count for layer in layers]
    assert sum(counts) == 2 * len(layers) and len(set(counts)) > 1
    assert [layer.top_k for layer in layers] == [min(c, m.top_k) for c, m in zip(counts, moe_layers(model.graph), strict=True)]
    assert torch.isfinite(graphs_logits(found, context.need_text("test").ids)).all()


def test_a_climb_with_free_places_also_begins_with_the_best_of_all_layers() -> None:
    model = tiny.model()
    context = graphs.context(model)
    options: dict[str, Any] = {"keep": 4, "initial": 1, "phase": "prune", "groups": 0, "prune_steps": 0, "tokens": 64}
    Eep(**options, start=["ean"], climb=2, budget="global").run(model, context)
    found = context.journal[-1]["experts"]
    kept: list[list[int]] = []
    for budget in ("per_layer", "global"):
        make_pass("remove_experts", {"criterion": "ean", "keep": 4, "budget": budget}).run(model, context)
        kept.append([context.journal[-1]["kept"][m.name] for m in moe_layers(model.graph)])
    assert found in kept and kept[0] != kept[1]


def test_losses_by_hand_and_their_gradients(tmp_path: Path) -> None:
    model = graphs.model()
    text = graphs.context(model).need_text("test")
    eye = torch.eye(6)[[1, 4, 5]]
    merge, route = (eye.clone().requires_grad_() for _ in range(2))
    candidates = Candidates(model, text.ids)
    kept = candidates.logits([Choice.keep([1, 4, 5], 6)])
    found = candidates.differentiable([Choice(merge, route)], text.ids)
    torch.testing.assert_close(found, kept, rtol=1e-5, atol=1e-5)  # one-hot rows are the experts themselves, and their scores
    for kind in ("kl", "perplexity"):
        measure = on_text(model, kind, text.ids, text.ids, "test")
        value = measure.loss([Choice(merge, route)], torch.tensor([0, 2]))
        p = candidates.differentiable([None], text.ids[[0, 2]]).double().log_softmax(-1)
        q = kept[[0, 2]].double().log_softmax(-1)
        nll = -q[:, :-1].gather(-1, text.ids[[0, 2], 1:, None]).mean()
        assert float(value.detach()) == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean() if kind == "kl" else nll), rel=1e-4)
        gradients = torch.autograd.grad(value, [merge, route])
        for at, gradient in enumerate(gradients):
            way = torch.randn(3, 6, generator=torch.Generator().manual_seed(at))
            steps = [[m.detach() + s * 1e-3 * way * (i == at) for i, m in enumerate((merge, route))] for s in (1, -1)]
            ends = [float(measure.loss([Choice(s[0], s[1])], torch.tensor([0, 2]))) for s in steps]
            assert float((gradient * way).sum()) == pytest.approx((ends[0] - ends[1]) / 2e-3, rel=0.05, abs=2e-3)


def test_errors() -> None:
    for options, message in (
        ({"climb": -1}, "climb is -1; expected at least 0"),
        ({"budget": "globl", "climb": 9}, "did you mean 'global'"),
        ({"budget": "global"}, "budget=global is for the climb alone"),
        ({"refine": {"step": 3}}, "did you mean 'steps'"),
        ({"refine": {"steps": 3}, "phase": "prune"}, "use phase=both or merge"),
        ({"refine": {"steps": 3, "rate": 0}}, "the rate above 0"),
    ):
        with pytest.raises(MoecError, match=message):
            make_pass("eep", options)
    model = graphs.model()
    with pytest.raises(MoecError, match="needs the model's tokenizer"):
        on_task(model, "x.jsonl", graphs.context(model).need_text("test"), 4, "eep")
