"""Bits by unit: sizes are exact, objectives agree with their closed forms, and a budget is worth what it costs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from moec.compiler.allocation import Problem, make_units
from moec.compiler.context import Context
from moec.compiler.errors import MoecError
from moec.compiler.interpreter import Interpreter
from moec.compiler.model import Model
from moec.compiler.plan import param_bytes
from moec.compiler.quantization import QuantizedWeights
from moec.compiler.quantizers import get_quantizer
from moec.compiler.sensitivity import get_objective, known_objectives
from moec.compiler.sensitivity.mc_moe import significance, widest
from moec.compiler.solver import choose
from moec.compiler.split_experts import uniform_experts
from moec.compiler.verify import verify
from moec.compiler.weights import WeightSource, constant
from moec.passes.assign_bits import AssignBits
from moec.runtime.formats import get_format
from moec.runtime.formats.int import IntFormat
from tests import graphs

UP, DOWN = "layers.0.experts.up", "layers.0.experts.down"
FORMATS = ("int2_channel", "int4_channel", "int8_channel")


@pytest.fixture(scope="module")
def model() -> Model:
    return graphs.model()


@pytest.fixture(scope="module")
def context(model: Model) -> Context:
    return graphs.context(model)


def problem(model: Model, context: Context, grain: str = "projection") -> Problem:
    return Problem(model, context, tuple(make_units(model, grain, ["experts", "attention"])), FORMATS, get_quantizer("rtn"))


def expert_bytes(model: Model) -> int:
    return sum(param_bytes(model.graph.params[name]) for name in (UP, DOWN))


@pytest.mark.parametrize("objective", known_objectives())
def test_every_objective_sees_that_more_bits_do_less_damage(objective: str, model: Model, context: Context) -> None:
    damages = get_objective(objective).damages(problem(model, context))
    assert damages.shape == (6 * 2 + 4, 3)
    assert bool((damages >= 0).all())
    total = damages.sum(0)
    assert total[0] > 2 * total[1] > 4 * total[2] > 0


def test_the_kl_objective_is_the_distance_of_a_model_with_one_unit_changed(model: Model, context: Context) -> None:
    asked = problem(model, context)
    text = context.need_text("")
    found = get_objective("kl", {"tokens": text.tokens}).damages(asked)
    for unit, option in ((1, 0), (6, 1), (12, 0), (15, 0)):  # projections of experts, a linear layer before and one after
        changed = asked.units[unit]
        name = changed.members[0]
        value = model.load(name).clone()
        part = value if changed.expert is None else value[changed.expert]
        chosen = get_format(FORMATS[option])
        assert isinstance(chosen, IntFormat)
        part.copy_(get_quantizer("rtn").quantize(part, chosen).values(chosen))
        truth, other = (logits(m, text.ids).log_softmax(-1) for m in (model, model.edited(model.graph, {name: constant(value)})))
        expected = float((truth.exp() * (truth - other)).sum(-1).mean())
        assert float(found[unit, option]) == pytest.approx(expected, rel=1e-3, abs=1e-7)


def logits(model: Model, ids: Tensor) -> Tensor:
    return Interpreter(model.graph, model.weights)(ids=ids, positions=torch.arange(ids.shape[1]).expand(ids.shape))[0]


def test_the_gauss_newton_estimate_is_near_the_kl(model: Model, context: Context) -> None:
    asked = replace(problem(model, context), units=tuple(make_units(model, "projection", ["experts"])))
    exact = get_objective("kl", {"tokens": context.need_text("").tokens}).damages(asked)[:, 1]
    estimate = get_objective("gauss_newton", {"samples": 8}).damages(asked)[:, 1]
    assert float(estimate.sum() / exact.sum()) == pytest.approx(1.0, abs=0.25)
    assert np.corrcoef(exact.log().numpy(), estimate.log().numpy())[0, 1] > 0.9


@pytest.mark.parametrize("scope", ["model", "layer"])
@pytest.mark.parametrize("units", ["expert", "projection"])
def test_the_budget_is_kept_and_used(units: str, scope: str, model: Model, context: Context) -> None:
    step = AssignBits(budget=5.5, formats=FORMATS, units=units, scope=scope, objective="output")
    context.journal.clear()
    result = step.run(model, context)
    (note,) = context.journal
    weights = 6 * (24 * 16 + 16 * 12)
    assert expert_bytes(result) == note["bytes"] <= note["budget_bytes"] == int(5.5 * weights / 8)
    assert note["bytes"] > note["budget_bytes"] - 8 * 24 * 16 * 4 / 8
    assert sum(note["units"].values()) == (6 if units == "expert" else 12)
    split = uniform_experts(result)
    verify(split.graph)
    ids = context.need_text("").ids[:2]
    torch.testing.assert_close(logits(split, ids), logits(result, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_menu_of_few_values(method: str, model: Model, context: Context) -> None:
    menu = ("binary_channel", "ternary_channel", "int3_channel")
    result = AssignBits(budget=3.0, formats=menu, method=method).run(model, context)
    found = [name for param in (UP, DOWN) for name in result.graph.params[param].format]
    assert set(found) >= {"binary_channel", "ternary_channel"}
    sizes = {"binary_channel": (4, 4), "ternary_channel": (6, 5), "int3_channel": (8, 7)}  # bytes of a row of 16 and of 12
    rows = [(24, 0)] * 6 + [(16, 1)] * 6
    expected = sum(count * sizes[name][at] for name, (count, at) in zip(found, rows, strict=True))
    assert expert_bytes(result) == expected <= int(3.0 * 6 * (24 * 16 + 16 * 12) / 8)
    for expert, name in enumerate(result.graph.params[UP].format):
        values = result.load(UP, expert)
        assert max(len(row.unique()) for row in values) <= {"binary_channel": 2, "ternary_channel": 3, "int3_channel": 8}[name]
    split = uniform_experts(result)
    ids = context.need_text("").ids[:2]
    torch.testing.assert_close(logits(split, ids), logits(result, ids), rtol=1e-4, atol=1e-4)


def test_larger_budgets_do_less_damage_down_to_that_of_the_widest_format(model: Model, context: Context) -> None:
    found = []
    for budget in (4.0, 5.0, 7.0, 12.0):
        context.journal.clear()
        AssignBits(budget=budget, formats=FORMATS, objective="output").run(model, context)
        found.append(context.journal[0]["damage"])
    assert found == sorted(found, reverse=True)
    asked = replace(problem(model, context), units=tuple(make_units(model, "projection", ["experts"])))
    assert found[-1] == pytest.approx(float(get_objective("output").damages(asked)[:, 2].sum()))


def test_experts_in_parts_are_the_same_experts(model: Model, context: Context) -> None:
    wide = AssignBits(budget=32, formats=["f32"], neurons=0, objective="output").run(model, context)
    assert wide.graph.params[UP].format == "f32"
    result = AssignBits(budget=6.0, formats=FORMATS, neurons=4, units="expert", objective="fisher").run(model, context)
    verify(result.graph)
    assert sum(node.op == "experts" for node in result.graph.nodes) == 3
    plain = Model(result.graph, unquantised(result))
    ids = context.need_text("").ids[:2]
    torch.testing.assert_close(logits(plain, ids), logits(model, ids), rtol=1e-4, atol=1e-4)


def unquantised(model: Model) -> WeightSource:
    """The values below the quantised ones."""
    assert isinstance(model.weights, QuantizedWeights)
    return model.weights.base


def test_layers_of_the_baseline_have_both_wide_formats(model: Model, context: Context) -> None:
    result = AssignBits(budget=4.6, formats=FORMATS, units="expert", scope="layer", objective="mc_moe").run(model, context)
    assert set(FORMATS[1:]) <= set(result.graph.params[UP].format)
    # Several nodes with programs of their own: each keeps its conditions.
    parts = AssignBits(budget=5.5, formats=FORMATS, units="expert", scope="layer", objective="mc_moe", neurons=4).run(model, context)
    assert all(set(FORMATS[1:]) <= set(parts.graph.params[f"{UP}.n{index}"].format) for index in range(3))


def test_significance_is_the_published_formula() -> None:
    loss = np.array([[8.0, 2.0, 1.0], [4.0, 1.0, 0.5]])
    found = significance([3, 1], [2, 2], loss)
    np.testing.assert_allclose(found, np.array([[0.75], [0.25]]) * 0.5**1.5 * loss)
    size = np.tile([1, 2, 3], (2, 1))
    assert choose(found, size, 5, widest(size, [0, 1])).options == (2, 1)


def test_bad_options(model: Model, context: Context) -> None:
    with pytest.raises(MoecError, match=r"smallest of the formats int4_channel need 2,\d+ bytes \(.* bits a weight\): raise the budget"):
        AssignBits(budget=2.0, formats=["int4_channel"]).run(model, context)
    for options, message in (
        ({"budget": 0}, "expected average bits"), ({"formats": "int4_g64"}, "expected a list"), ({"scope": "all"}, "unknown scope"),
        ({"units": "row"}, "unknown units"), ({"objective": "outputs"}, "did you mean 'output'"),
        ({"others": ["atention"]}, "did you mean"),
        ({"others": "attention"}, "expected a mapping"), ({"others": {"attention": []}}, "others, attention=\\[\\]: expected a list"),
        ({"others": ["shared"], "objective": "output"}, "output does not measure shared in one unit with experts: use gauss_newton or kl"),
        ({"others": ["head"], "objective": "fisher"}, "fisher does not measure head"),
        ({"others": ["dense"], "scope": "layer"}, "use scope=model"),
        ({"objective_options": {"sample": 2}}, "did you mean 'samples'"), ({"neurons": -1}, "neurons=-1"),
    ):  # fmt: skip
        with pytest.raises(MoecError, match=message):
            AssignBits(**options)
    with pytest.raises(MoecError, match="add --calibration"):
        AssignBits(budget=8.0).run(model, Context())
