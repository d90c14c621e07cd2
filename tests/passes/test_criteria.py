"""Criteria: by hand, and against what they promise."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import combinations

import pytest
import torch
from torch import Tensor

from moec.compiler.calibration.capture import capture
from moec.compiler.calibration.collect import expert_outputs
from moec.compiler.calibration.statistics import LayerStatistics
from moec.compiler.errors import MoecError
from moec.compiler.layers import moe_layers
from moec.passes.criteria import View, best, get_criterion, known_criteria, views
from moec.passes.criteria.naee import _Error
from tests import graphs


def view(seed: int = 0) -> View:
    model = graphs.model(seed)
    (found,) = views(model, moe_layers(model.graph), ("statistics", "inputs"), graphs.context(model), "test", tokens=64)
    return found


def statistics(**known: Tensor) -> LayerStatistics:
    """Statistics of which only some are known."""
    return LayerStatistics(**{f.name: known.get(f.name, torch.empty(0)) for f in fields(LayerStatistics)})


def test_scores_by_hand() -> None:
    # Two tokens: the first to experts 0 and 1 with weights .6 and .4, the second to 0 and 2 with .5 and .5; lengths 3 and 1, 2, 4.
    known = statistics(
        count=torch.tensor([2, 1, 1, 0]),
        weight=torch.tensor([1.1, 0.4, 0.5, 0.0]),
        output_norm=torch.tensor([4.0, 2.0, 4.0, 0.0]),
        weighted_norm=torch.tensor([0.6 * 3 + 0.5 * 1, 0.4 * 2, 0.5 * 4, 0.0]),
        score=torch.tensor([1.0, 0.6, 0.3, 0.1]),
    )
    expected = {
        "reap": [1.15, 0.8, 2.0, 0.0], "weighted_ean": [2.3, 0.8, 2.0, 0.0], "ean": [4, 2, 4, 0], "frequency": [2, 1, 1, 0],
        "weighted_frequency": [1.1, 0.4, 0.5, 0.0], "soft_frequency": [1.0, 0.6, 0.3, 0.1],
    }  # fmt: skip
    for name, scores in expected.items():
        found = get_criterion(name).scores(replace(view(), known=known))
        assert found.tolist() == pytest.approx(scores), name


@pytest.mark.parametrize("name", known_criteria())
def test_each_keeps_as_many_as_it_is_told(name: str) -> None:
    seen = view()
    for count in (2, 4, 6):
        kept = get_criterion(name).keep(seen, count)
        assert kept == sorted(set(kept)) and len(kept) == count and set(kept) <= set(range(6))
    assert get_criterion(name).keep(seen, 3) == get_criterion(name).keep(view(), 3)  # the same again


def test_naee_is_the_subset_of_the_least_error() -> None:
    seen = view(3)
    error = _Error(seen)
    errors: dict[tuple[int, ...], float] = {subset: error(subset) for subset in combinations(range(6), 3)}
    assert tuple(get_criterion("naee").keep(seen, 3)) == min(errors, key=lambda s: errors[s])
    searched = tuple(get_criterion("naee", {"exhaustive": 0, "beam": 1}).keep(seen, 3))
    assert errors[searched] <= sorted(errors.values())[len(errors) // 2]


def test_naee_measures_the_error_of_the_layer() -> None:
    seen = view(1)
    model, layer, inputs = seen.model, seen.layer, seen.inputs
    outputs = torch.stack([expert_outputs(model, layer, e, inputs.x)[0] for e in range(6)], 1)  # [N, E, D]

    def result(subset: tuple[int, ...]) -> Tensor:
        logits = torch.full_like(inputs.logits, -torch.inf)
        logits[:, subset] = inputs.logits[:, subset]
        best_two = logits.softmax(-1).topk(2, -1)
        weights = best_two.values / best_two.values.sum(-1, keepdim=True)
        return (weights[:, :, None] * outputs.gather(1, best_two.indices[:, :, None].expand(-1, -1, 16))).sum(1)

    for subset in ((0, 1, 4), (2, 3), (1, 2, 3, 4, 5)):
        expected = float((result(subset) - result(tuple(range(6)))).square().sum())
        assert _Error(seen)(subset) == pytest.approx(expected, rel=1e-3)


def test_stun_keeps_one_of_twins() -> None:
    seen = view(2)
    gate = seen.model.load("layers.0.gate.weight").clone()
    gate[4] = gate[1] + 1e-4
    twin = replace(seen, model=seen.model.with_params([], {"layers.0.gate.weight": lambda e: gate if e is None else gate[e]}))
    kept = get_criterion("stun", {"together": 0.0}).keep(twin, 5)
    assert len({1, 4} & set(kept)) == 1


def test_best_takes_as_many_of_each_group() -> None:
    assert best(torch.tensor([9.0, 8, 7, 1, 2, 3]), 2, groups=2) == [0, 5]
    assert best(torch.tensor([9.0, 8, 7, 1, 2, 3]), 3, groups=2) == [0, 1, 2]  # three cannot be shared out


def test_what_enters_a_layer_is_captured() -> None:
    model = graphs.model()
    (found,) = capture(model, graphs.text(windows=4, tokens=16), 32).values()
    assert found.x.shape == (32, 16)
    torch.testing.assert_close(found.logits, found.x @ model.load("layers.0.gate.weight").T)
    assert torch.equal(found.logits.topk(2).indices, found.rows)


def test_errors() -> None:
    with pytest.raises(MoecError, match="unknown criterion 'reep': did you mean 'reap'"):
        get_criterion("reep")
    with pytest.raises(MoecError, match="has no options, got 'x'"):
        get_criterion("reap", {"x": 1})
    with pytest.raises(MoecError, match="unknown option of the criterion naee 'beem': did you mean 'beam'"):
        get_criterion("naee", {"beem": 1})
    with pytest.raises(MoecError, match="beam 0: expected at least 0 and 1"):
        get_criterion("naee", {"beam": 0}).keep(view(), 3)
