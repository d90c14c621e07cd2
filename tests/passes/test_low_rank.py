"""Factors in the place of experts' matrices: the budget, the choice, and what they leave of the function."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from moec.compiler.allocation import make_units
from moec.compiler.calibration.capture import capture
from moec.compiler.calibration.collect import expert_outputs
from moec.compiler.context import Context
from moec.compiler.errors import MoecError
from moec.compiler.layers import moe_layers
from moec.compiler.low_rank import Norm
from moec.compiler.model import Model
from moec.compiler.plan import param_bytes
from moec.compiler.quantizers import get_quantizer
from moec.compiler.roles import parameter_roles
from moec.compiler.sensitivity import get_objective
from moec.compiler.stored import as_stored
from moec.compiler.verify import verify
from moec.compiler.weights import constant
from moec.passes.factoring.fit import fit, refitted
from moec.passes.factoring.ranks import RankProblem
from moec.passes.low_rank import LowRank, with_ranks
from moec.passes.quantize import Quantize
from moec.passes.remove_experts import RemoveExperts
from tests import graphs

UP, DOWN = "layers.0.experts.up", "layers.0.experts.down"
WHOLE = 4 * 6 * (24 * 16 + 16 * 12)
SHARES = (1, 0.8, 0.5, 0.3)


def expert_bytes(model: Model) -> int:
    roles = parameter_roles(model.graph)
    return sum(param_bytes(p) for name, p in model.graph.params.items() if roles[name] == "experts")


def kl(model: Model, context: Context) -> float:
    return context.damage(as_stored(model), "test").kl_divergence


@pytest.fixture(scope="module")
def model() -> Model:
    return graphs.model()


@pytest.fixture(scope="module")
def context(model: Model) -> Context:
    return graphs.context(model)


@pytest.mark.parametrize("units", ["expert", "projection"])
@pytest.mark.parametrize("objective", ["hessian", "gauss_newton", "output"])
def test_a_budget_is_kept_and_more_is_better(model: Model, context: Context, units: str, objective: str) -> None:
    damages = []
    for budget in (0.4, 0.6, 0.85):
        made = LowRank(budget, SHARES, units, multiple=1, objective=objective).run(model, context)
        verify(made.graph)
        assert expert_bytes(made) <= budget * WHOLE
        assert expert_bytes(made) == context.journal[-1]["bytes"]
        assert sum(layer.count for layer in moe_layers(made.graph)) == 6
        damages.append(kl(made, context))
    assert damages[0] > damages[1] > damages[2] > 0


def test_the_choice_is_the_best_of_all(model: Model, context: Context) -> None:
    problem = RankProblem(model, context, tuple(make_units(model, "expert", ["experts"])), ("1", "0.5"), get_quantizer("rtn"), multiple=1)
    damages = get_objective("hessian").damages(problem).numpy()
    budget = int(0.7 * WHOLE)
    rows = np.arange(6)
    choices = [np.array(c) for c in itertools.product(range(2), repeat=6) if problem.sizes[rows, list(c)].sum() <= budget]
    best = min(damages[rows, c].sum() for c in choices)
    LowRank(0.7, (1, 0.5), "expert", multiple=1, objective="hessian").run(model, context)
    assert context.journal[-1]["damage"] == pytest.approx(best, rel=1e-9)


def test_the_hessian_objective_is_the_singular_values_cut_off(model: Model, context: Context) -> None:
    problem = RankProblem(
        model, context, tuple(make_units(model, "projection", ["experts"])), ("1", "0.5"), get_quantizer("rtn"), multiple=1
    )
    damages = get_objective("hessian").damages(problem)
    assert not damages[:, 0].any()
    found = capture(model, context.need_text("x"), 10**6)["e"]
    for expert in (1, 4):
        token, slot = torch.where(found.rows == expert)
        x = found.x[token] * found.weights[token, slot, None]
        norm = Norm.of(x.T.double() @ x.double() / len(x), 16)
        singular = torch.linalg.svdvals(model.load(UP, expert).double() @ norm.root)
        rank = int(0.5 * 24 * 16 / (24 + 16))
        expected = float(singular[rank:].square().sum()) * len(x) / len(found.x)
        assert float(damages[2 * expert, 1]) == pytest.approx(expected, rel=1e-3)


def test_experts_of_low_rank_cost_nothing(model: Model) -> None:
    """Matrices that have the rank that they are given stay what they are."""
    exact = graphs.factored(model, (4, 3), whole=False)
    dense = model.edited(model.graph, {n: constant(exact.load(f"{n}.left") @ exact.load(f"{n}.right")) for n in (UP, DOWN)})
    context = graphs.context(dense)
    for refit in (True, False):
        made = LowRank(0.5, (0.45,), multiple=1, refit=refit, ridge=1e-4).run(dense, context)
        assert [layer.factors[UP][0] for layer in moe_layers(made.graph)] == [f"{UP}.left"]  # one node
        assert kl(made, context) < 1e-6
        torch.testing.assert_close(graphs.logits(made), graphs.logits(dense), rtol=1e-3, atol=1e-3)


def test_threads_ask_at_a_time(model: Model, context: Context) -> None:
    """Each weight has the nearest matrix of its rank, whoever asks for others meanwhile."""
    problem = RankProblem(
        model, context, tuple(make_units(model, "expert", ["experts"])), ("1", "0.8", "0.4"), get_quantizer("rtn"), multiple=1
    )

    def errors(seed: int) -> list[tuple[float, float]]:
        weight = torch.randn(24, 16, generator=torch.Generator().manual_seed(seed))
        squares = torch.linalg.svdvals(weight.double()).square()
        found = []
        for option, rank in (("1", 16), ("0.8", 7), ("0.4", 3)):
            error = problem.changed(weight, option, lambda: torch.eye(16)) - weight
            found.append((float(error.double().square().sum()), float(squares[rank:].sum())))
        return found

    with ThreadPoolExecutor(4) as pool:
        for found, expected in itertools.chain.from_iterable(pool.map(errors, range(200))):
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)


def output_error(made: Model, model: Model, context: Context) -> float:
    """The squared error of the layer's outputs on the calibration text, by experts; one node."""
    found = capture(model, context.need_text("x"), 10**6)["e"]
    (old,), (new,) = moe_layers(model.graph), moe_layers(made.graph)
    total = 0.0
    for expert in range(6):
        token, slot = torch.where(found.rows == expert)
        outputs = [expert_outputs(m, layer, expert, found.x[token])[0] for m, layer in ((model, old), (made, new))]
        total += float(((outputs[0] - outputs[1]) * found.weights[token, slot, None]).square().sum())
    return total


def test_refitting_lowers_the_error_of_the_outputs(model: Model, context: Context) -> None:
    errors = [output_error(LowRank(0.6, (0.6,), multiple=1, refit=refit).run(model, context), model, context) for refit in (True, False)]
    assert errors[0] < errors[1]


def test_a_down_projection_that_stays_whole_is_refitted(model: Model, context: Context) -> None:
    (layer,) = moe_layers(model.graph)
    ranks = {(UP, expert): 5 for expert in range(6)}
    refit, plain = (with_ranks(model, layer, ranks, fit(model, [layer], ranks, ridge, context)) for ridge in (0.01, None))
    assert set(moe_layers(refit.graph)[0].factors) == {UP}
    assert torch.equal(plain.load(DOWN), model.load(DOWN))
    assert output_error(refit, model, context) < output_error(plain, model, context)


def test_a_refitted_matrix_is_the_least_squares_solution() -> None:
    generator = torch.Generator().manual_seed(0)
    down, before = torch.randn(5, 7, generator=generator), torch.randn(40, 7, generator=generator)
    after = before + 0.3 * torch.randn(40, 7, generator=generator)
    solution = torch.linalg.lstsq(after.double(), before.double() @ down.double().T).solution.T
    torch.testing.assert_close(refitted(down, before, after, 0.0).double(), solution, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(refitted(down, before, before, 0.5), down, rtol=1e-4, atol=1e-4)


def test_after_removal_and_before_quantisation(model: Model, context: Context) -> None:
    fewer = RemoveExperts(criterion="frequency", keep=4).run(model, context)
    made = LowRank(0.7, SHARES, multiple=1).run(fewer, context)
    verify(made.graph)
    packed = Quantize(experts="int8_channel", method="gptq").run(made, context)
    verify(packed.graph)
    assert kl(packed, context) == pytest.approx(kl(made, context), rel=0.1)


def test_bad_input(model: Model, context: Context) -> None:
    for options, message in (
        ({"budget": 1.5}, "share of the experts' bytes"), ({"shares": []}, "shares"), ({"shares": [0, 1]}, "shares"),
        ({"units": "layer"}, "units of low_rank"), ({"multiple": 0}, "multiple"),
    ):  # fmt: skip
        with pytest.raises(MoecError, match=message):
            LowRank(**options)
    with pytest.raises(MoecError, match="smallest of the shares"):
        LowRank(0.1, multiple=1).run(model, context)
    with pytest.raises(MoecError, match="low_rank needs calibration text"):
        LowRank(0.6, multiple=1).run(model, Context())
    with pytest.raises(MoecError, match="low-rank factors"):
        LowRank(0.6, multiple=1).run(graphs.factored(model), context)
    quantised = Model(model.graph.with_params([replace(model.graph.params[UP], format="int4_g32")]), model.weights)
    with pytest.raises(MoecError, match="put low_rank before"):
        LowRank(0.6, multiple=1).run(quantised, context)
    assert LowRank().run(model, Context()) is model
