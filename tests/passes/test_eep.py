"""The search: its parts by hand, that it improves, that it goes on where it was, and what it may not do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.compiler.context import Context
from moec.compiler.errors import MoecError
from moec.compiler.frontend.tokenizer import load_tokenizer
from moec.compiler.layers import moe_layers
from moec.compiler.model import Model
from moec.compiler.passes import make_pass
from moec.compiler.progress import Progress
from moec.compiler.verify import verify
from moec.passes.eep import Eep
from moec.passes.evolution import fitness
from moec.passes.evolution.genes import Candidate, Rates, cross, mutate, mutate_one_hot, one_hot, random_candidate
from moec.passes.evolution.search import Plan, Search
from tests import graphs

SMALL: dict[str, Any] = {"keep": 3, "initial": 4, "prune_steps": 6, "merge_steps": 6, "tokens": 64}


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 9999), sizes=st.lists(st.tuples(st.integers(1, 4), st.integers(5, 8)), min_size=1, max_size=3))
def test_changes_keep_what_they_must(seed: int, sizes: list[tuple[int, int]]) -> None:
    rng = np.random.default_rng(seed)
    first, second = random_candidate(sizes, rng), random_candidate(sizes, rng)
    for _ in range(5):
        child = mutate_one_hot(first, Rates(), rng)
        assert child.one_hot and any((a != b).any() for a, b in zip(child.merge, first.merge, strict=True))
        assert all(len(set(m.argmax(1).tolist())) == kept for m, (kept, _) in zip(child.merge, sizes, strict=True))
        first = child
    noisy = mutate(first, Rates(), rng)
    assert [m.shape for m in (*noisy.merge, *noisy.route)] == sizes * 2
    mixed = cross(noisy, second, Rates(), rng)
    for at, row in enumerate((*mixed.merge, *mixed.route)):
        parents = [(*c.merge, *c.route)[at] for c in (noisy, second)]
        assert all(any(np.array_equal(r, parent[i]) for parent in parents) for i, r in enumerate(row))


def test_a_search_climbs_and_goes_on_where_it_was(tmp_path: Path) -> None:
    wanted = one_hot([1, 4, 6], 8)

    def worth(candidate: Candidate) -> float:
        return -10 * float(sum(np.abs(m.sum(0) - wanted.sum(0)).sum() for m in candidate.merge))

    def search(steps: int, file: Path | None) -> Search:
        return Search([(3, 8), (3, 8)], worth, Plan(5, steps, 0), Rates(), 7, keep_in=file, identity="a")

    quiet = Progress(quiet=True)
    best, trail = search(120, None).run(quiet)
    assert trail == sorted(trail) and trail[-1] == 0.0 and best.fitness == 0.0
    file = tmp_path / "search.safetensors"
    search(40, file).run(quiet)
    again, resumed = search(120, file).run(quiet)
    assert resumed == trail and all(np.array_equal(a, b) for a, b in zip(again.merge, best.merge, strict=True))
    other = Search([(3, 8), (3, 8)], worth, Plan(5, 1, 0), Rates(), 8, keep_in=file, identity="b")
    assert len(other.run(quiet)[1]) == 6  # what another search kept is left alone
    file.write_bytes(b"nothing")
    with pytest.raises(MoecError, match="not what a search keeps"):
        search(1, file).run(quiet)


@pytest.mark.parametrize("phase", ["prune", "merge", "both"])
@pytest.mark.parametrize("measure", ["kl", "perplexity"])
def test_the_result_is_what_was_found(phase: str, measure: str) -> None:
    model = graphs.model()
    context = graphs.context(model)
    found = Eep(phase=phase, fitness=measure, start=["frequency"], **SMALL).run(model, context)
    verify(found.graph)
    note = context.journal[-1]
    trail = note["fitness_by_evaluation"]
    assert trail[-1] >= trail[0] and trail == sorted(trail)
    assert moe_layers(found.graph)[0].count == 3
    assert (note["experts"] is None) == (note["merge"] is not None)
    # The fitness of the model itself, on the same text.
    ids = context.need_text("test").sample(64).ids
    logits = [run(m, ids) for m in (model, found)]
    of = fitness.of_distance(logits[0]) if measure == "kl" else fitness.of_text(ids, logits[0])
    assert of(logits[1]) == pytest.approx(trail[-1], abs=0.02)


def run(model: Model, ids: torch.Tensor) -> torch.Tensor:
    from moec.compiler.damage import each_logits

    parts: list[torch.Tensor] = []
    each_logits(model, ids, lambda _, part: parts.append(part))
    return torch.cat(parts)


def test_fewer_experts_than_a_token_has() -> None:
    model = graphs.model()
    context = graphs.context(model)
    found = Eep(**{**SMALL, "keep": 1}, phase="prune").run(model, context)
    (layer,) = moe_layers(found.graph)
    assert (layer.count, layer.top_k) == (1, 1)
    alone = Eep(**{**SMALL, "keep": None}, top_k=1, phase="merge").run(model, context)
    (layer,) = moe_layers(alone.graph)
    assert (layer.count, layer.top_k) == (6, 1)
    for subject in (found, alone):
        verify(subject.graph)
        assert torch.isfinite(graphs.logits(subject)).all()


def test_fitness_by_hand() -> None:
    truth = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)).double()
    other = truth + torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(1)).double()
    p, q = truth.softmax(-1), other.softmax(-1)
    kl = float((p * (p / q).log()).sum(-1).mean())
    assert fitness.of_distance(truth)(other) == pytest.approx(100 * np.exp(-kl))
    ids = torch.tensor([[1, 2, 3, 4, 5], [0, 6, 5, 1, 1]])
    perplexity = [float(torch.exp(-x[:, :-1].log().gather(-1, ids[:, 1:, None]).mean())) for x in (p, q)]
    assert fitness.of_text(ids, truth)(other) == pytest.approx(100 * perplexity[0] / perplexity[1])
    answer = torch.tensor([[False, True, True, False, False], [False, False, False, True, False]])
    logits = torch.zeros(2, 5, 7)
    logits[0, 1, 3] = logits[0, 2, 4] = 3.0  # the first is right, the second is not sure of it
    logits[1, 3, 0] = 1.0
    chances = [3.0 - np.log(np.exp(3) + 6)] * 2 + [-np.log(np.e + 6)]
    assert fitness.of_task(fitness.Questions(ids, answer))(logits) == pytest.approx(50 + np.exp(np.mean(chances)), rel=1e-5)


def test_questions_are_read(tmp_path: Path) -> None:
    file, tokenizer = tmp_path / "task.jsonl", load_tokenizer("examples/models/tiny-moe")
    rows: list[dict[str, Any]] = [
        {"prompt": "Question: 1 + 1?\nAnswer:", "answer": "2"},
        {"prompt": "Question: 2 + 2?\nReasoning:", "answer": "4", "completion": " 2 and 2 are 4.\nAnswer: 4"},
        {"prompt": "Question: 3 + 3?\nReasoning:", "answer": 6},
        {"prompt": "long " * 500, "answer": "no"},
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    found = fitness.read_questions(file, tokenizer, 10, 64)
    wholes = ["Question: 1 + 1?\nAnswer: 2", rows[1]["prompt"] + rows[1]["completion"], "Question: 3 + 3?\nReasoning:\nAnswer: 6"]
    for row, (whole, entry) in enumerate(zip(wholes, rows, strict=False)):
        ids = tokenizer.encode(whole, add_special_tokens=False).ids
        assert found.ids[row, : len(ids)].tolist() == ids
        places = found.answer[row].nonzero()[:, 0] + 1
        assert whole.endswith(tokenizer.decode(found.ids[row, places].tolist()))
        assert int(places[-1]) == len(ids) - 1 and int(places[0]) == len(
            tokenizer.encode(str(entry["prompt"]), add_special_tokens=False).ids
        )
    for content, message in (("{}\n", "line 1: expected"), ("", "no question fits"), ("[1]", "line 1: expected")):
        file.write_text(content)
        with pytest.raises(MoecError, match=message):
            fitness.read_questions(file, tokenizer, 1, 64)
    with pytest.raises(MoecError, match="cannot read the task"):
        fitness.read_questions(tmp_path / "none", tokenizer, 1, 64)


def test_a_search_is_kept_and_found_again(tmp_path: Path) -> None:
    model = graphs.model()
    trails = []
    for work in (tmp_path, tmp_path, None):
        context = graphs.context(model)
        context.work = work
        Eep(**SMALL).run(model, context)
        trails.append(context.journal[-1]["fitness_by_evaluation"])
    assert trails[0] == trails[1] == trails[2]
    assert len(list(tmp_path.glob("eep-*.safetensors"))) == 1


def test_errors() -> None:
    model = graphs.model()
    for options, message in (
        ({"phase": "prun"}, "did you mean 'prune'"),
        ({"fitness": "k"}, "unknown eep fitness 'k'"),
        ({"fitness": "task"}, "fitness=task needs task=FILE"),
        ({"task": "x.jsonl"}, "no other fitness takes one"),
        ({"groups": -1}, "groups is -1; expected at least 0"),
        ({"top_k": 0}, "top_k is 0; expected at least 1"),
        ({"rates": {"rows": 0.1}}, "did you mean 'row'"),
        ({"start": ["naee"]}, "start=naee scores no single experts"),
        ({"start": ["reep"]}, "did you mean 'reap'"),
    ):
        with pytest.raises(MoecError, match=message):
            make_pass("eep", options)
    with pytest.raises(MoecError, match="eep needs calibration text"):
        Eep(keep=3).run(model, Context())
    with pytest.raises(MoecError, match="keep is 7, and %e has 6 experts"):
        Eep(**{**SMALL, "keep": 7}).run(model, graphs.context(model))
    with pytest.raises(MoecError, match="top_k is 4, and %e would have 3 experts"):
        Eep(**SMALL, top_k=4).run(model, graphs.context(model))
    with pytest.raises(MoecError, match="needs the model's tokenizer"):
        Eep(keep=3, fitness="task", task="x.jsonl").run(model, graphs.context(model))
