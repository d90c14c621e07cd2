"""mask_router: starts as a rule, learns what weights do not say, drops its target, and is the same for the same seed."""

from __future__ import annotations

import pytest
import torch

from moec.compiler import ops
from moec.compiler.errors import MoecError
from moec.compiler.layers import moe_layers
from moec.compiler.verify import verify
from moec.passes.mask_router import MaskRouterPass
from moec.passes.routing.masks import error_at, features_of, fit_locally, keep_errors, shift_for, start_from_rule
from moec.passes.routing.observe import Block
from moec.passes.routing.tune import masked
from moec.passes.rules import ratio
from tests import graphs
from tests.passes.routing_models import dropped, model, routing

IDS = graphs.text().ids


def block(tokens: int = 2048) -> Block:
    """A layer in which the sign of x[0] says whether experts after the first matter."""
    draw = torch.Generator().manual_seed(0)
    x, slots = torch.randn(tokens, 8, generator=draw), torch.randn(tokens, 3, 8, generator=draw)
    weights = torch.rand(tokens, 3, generator=draw).add(0.2).sort(descending=True).values
    weights = weights / weights.sum(-1, keepdim=True)
    slots[:, 1:] *= torch.where(x[:, 0] > 0, 3.0, 0.01)[:, None, None]
    layer = moe_layers(model().graph)[0]
    return Block(layer, x, torch.randn(tokens, 8, generator=draw), torch.zeros(tokens, 3, dtype=torch.int64), weights, slots)


def test_starts_as_the_rule() -> None:
    given = block()
    router = start_from_rule(given, 0.3)
    kept = router.logits(given.x, given.weights).argmax(-1) + 1
    attrs = ratio.fit(given.weights, 0.3)
    rule = (ops.skip(given.weights, torch.zeros(len(kept), 3, dtype=torch.int64), experts=1, **attrs)[1] == 0).sum(-1)
    assert float((kept == rule).float().mean()) > 0.999  # but for ties within rounding
    weight, bias = router.folded()
    folded = torch.nn.functional.linear(features_of(given.x, given.weights), weight, bias)
    torch.testing.assert_close(folded, router.logits(given.x, given.weights), rtol=1e-4, atol=1e-4)


def test_learns_what_weights_do_not_say() -> None:
    given = block()
    errors = keep_errors(given, normalize=False)
    router, found = fit_locally(given, errors, 0.3, steps=60, seed=0)
    assert min(found.values()) < 0.5 * found["rule"]
    logits = router.logits(given.x, given.weights)
    assert error_at(logits, errors, 0.3) < 0.5 * error_at(start_from_rule(given, 0.3).logits(given.x, given.weights), errors, 0.3)


def test_errors_by_hand() -> None:
    given = block(4)
    for normalize in (False, True):
        errors = keep_errors(given, normalize=normalize)
        whole, part = given.slots.sum(1), given.slots[:, :2].sum(1)
        if normalize:
            part = part * (given.weights.sum(1) / given.weights[:, :2].sum(1))[:, None]
        expected = (whole - part).square().sum(1) / (given.residual + whole).square().sum(1)
        torch.testing.assert_close(errors[:, 1], expected)
        assert errors[:, 2].max() < 1e-9


def test_a_shift_hits_a_target() -> None:
    logits = [torch.randn(500, 4, generator=torch.Generator().manual_seed(s)) for s in (0, 1)]
    shift = shift_for(logits, 0.37)
    kept = sum(int((part + shift * torch.arange(4)).argmax(-1).sum()) + 500 for part in logits)
    assert kept / 4000 == pytest.approx(0.63, abs=1e-3)


def test_soft_masks_are_nested() -> None:
    weights, keep = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.1, 0.6, 0.3]])
    torch.testing.assert_close(masked(weights, keep, normalize=False), torch.tensor([[0.5, 0.3 * 0.9, 0.2 * 0.3]]))
    torch.testing.assert_close(masked(weights, keep, normalize=True).sum(-1), torch.ones(1))


@pytest.mark.parametrize("joint_steps", [0, 3])
def test_the_target_is_dropped(joint_steps: int) -> None:
    subject = model()
    step = MaskRouterPass(target=0.3, joint_steps=joint_steps, local_steps=20)
    changed = step.run(subject, graphs.context(subject))
    verify(changed.graph)
    assert sum(dropped(changed, IDS).values()) / 2 == pytest.approx(0.3, abs=0.04)
    ids = routing(changed, IDS).ids["e"]
    assert (ids[..., 0] < 6).all()  # the first expert always runs, and those that run come first
    assert ((ids < 6).long().diff(dim=-1) <= 0).all()
    again = step.run(subject, graphs.context(subject))
    assert torch.equal(graphs.logits(changed), graphs.logits(again))


def test_mistakes() -> None:
    for options in ({"target": 0}, {"target": 0.2, "windows": 0}, {"target": 0.2, "joint_steps": -1}):
        with pytest.raises(MoecError, match="mask_router: "):
            MaskRouterPass(**options)
    with pytest.raises(MoecError, match="less than one expert"):
        MaskRouterPass(target=0.7).run(model(), graphs.context(model()))
