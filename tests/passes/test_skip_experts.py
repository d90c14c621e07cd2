"""skip_experts: thresholds skip the fraction they were asked for, layers share a target by damage, protected tokens keep all."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.compiler import ops
from moec.compiler.errors import MoecError
from moec.compiler.verify import verify
from moec.passes.routing.allocate import Curve, curve_through, share
from moec.passes.rules import get_rule, known_rules
from moec.passes.skip_experts import SkipExperts
from tests import graphs
from tests.passes.routing_models import dropped, model, routing

IDS = graphs.text().ids


@settings(max_examples=20, deadline=None)
@given(k=st.integers(2, 6), fraction=st.floats(0.01, 1), seed=st.integers(0, 99), rule=st.sampled_from(["ratio", "top_p"]))
def test_a_threshold_skips_its_fraction(k: int, fraction: float, seed: int, rule: str) -> None:
    weights = torch.randn(400, 8, generator=torch.Generator().manual_seed(seed)).softmax(-1).sort(descending=True).values[:, :k]
    attrs = get_rule(rule)(weights, fraction)
    ids = ops.skip(weights, torch.zeros(400, k, dtype=torch.int64), experts=1, **attrs)[1]
    assert float(ids.float().mean()) == pytest.approx(min(fraction, (k - 1) / k), abs=3 / 400)


def test_published_thresholds_are_medians() -> None:
    weights = torch.rand(501, 2, generator=torch.Generator().manual_seed(0)).sort(descending=True).values
    median = float((weights[:, 1] / weights[:, 0]).median())
    assert get_rule("naee")(weights, None)["ratio"] == pytest.approx(median)
    assert get_rule("ratio")(weights, None)["ratio"] == pytest.approx(median)
    assert {"ratio", "top_p", "naee"} <= set(known_rules())


@pytest.mark.parametrize("rule", ["ratio", "top_p"])
@pytest.mark.parametrize("per_layer", [False, True])
def test_the_target_is_dropped(rule: str, per_layer: bool) -> None:
    subject = model()
    context = graphs.context(subject)
    changed = SkipExperts(rule=rule, target=0.3, per_layer=per_layer).run(subject, context)
    verify(changed.graph)
    found = dropped(changed, IDS)
    assert sum(found.values()) / 2 == pytest.approx(0.3, abs=0.02)  # later layers see other inputs than those calibrated on
    assert per_layer or found["e"] == pytest.approx(0.3, abs=0.01)
    assert context.journal[-1]["skipped"]["e"] == pytest.approx(found["e"], abs=0.01)


def test_a_limit_on_damage_lowers_the_target() -> None:
    subject = model()
    free = graphs.context(subject)
    damage = free.damage(SkipExperts(rule="ratio", target=0.5).run(subject, free), "test").kl_divergence
    context = replace(graphs.context(subject), max_kl=damage / 3)
    changed = SkipExperts(rule="ratio", target=0.5).run(subject, context)
    assert context.damage(changed, "test").kl_divergence <= damage / 3
    assert 0.05 < sum(dropped(changed, IDS).values()) / 2 < 0.45


def test_weights_that_are_left() -> None:
    subject = model()
    before = routing(subject, IDS).weights["e"]
    for normalize in (False, True):
        changed = SkipExperts(rule="ratio", threshold=0.6, normalize=normalize).run(subject, graphs.context(subject))
        weights = routing(changed, IDS).weights["e"]
        if normalize:
            torch.testing.assert_close(weights.sum(-1), before.sum(-1))
        else:
            torch.testing.assert_close(weights, before * (weights > 0))


def test_protected_tokens_keep_all_experts() -> None:
    subject = model()
    context = graphs.context(subject)
    changed = SkipExperts(rule="ratio", target=0.4, protect=0.25, per_layer=False).run(subject, context)
    verify(changed.graph)
    assert context.journal[-1]["skipped"] == pytest.approx(dropped(changed, IDS), abs=1e-4)
    found = routing(changed, IDS)
    norm = found.x["e"].abs().sum(-1)  # in this model experts read the residual stream itself
    runs = (found.ids["e"] < 6).sum(-1)
    limit = norm.flatten().sort(descending=True).values[round(0.25 * (norm.numel() - 1))]
    assert (runs[norm >= limit] == 3).all()
    assert (runs[norm < limit] < 3).any()


def test_shares_have_equal_marginal_damage() -> None:
    curves = [Curve(1.0, 2.0), Curve(2.0, 1.5), Curve(0.3, 3.0)]
    found = share(curves, [0.75] * 3, 0.2)
    assert sum(found) == pytest.approx(0.6)
    slopes = [c.scale * c.power * f ** (c.power - 1) for c, f in zip(curves, found, strict=True)]
    assert slopes == pytest.approx([slopes[0]] * 3)
    assert share(curves, [0.5] * 3, 0.6) == [0.5] * 3
    assert curve_through((0.1, 0.0), (0.2, 0.0)).scale > 0


def test_mistakes() -> None:
    for options, message in (
        ({"rule": "top-p"}, "top_p"),
        ({"rule": "ratio", "target": 1.0}, "between 0 and 1"),
        ({"rule": "naee", "target": 0.2}, "not both"),
        ({"rule": "ratio", "threshold": 2}, "at most 1"),
        ({"threshold": 0.5}, "needs the rule"),
        ({"rule": "ratio", "protect": 1}, "protect"),
    ):
        with pytest.raises(MoecError, match=message):
            SkipExperts(**options)
    subject = model(top_k=1)
    with pytest.raises(MoecError, match="always runs"):
        SkipExperts(rule="ratio", target=0.2).run(subject, graphs.context(subject))
    with pytest.raises(MoecError, match="needs calibration text"):
        SkipExperts(rule="ratio", target=0.2).run(model(), replace(graphs.context(subject), text=None))
