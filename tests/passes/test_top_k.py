"""top_k: the router's own meaning with another K, and what the weights become."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moec.compiler.errors import MoecError
from moec.compiler.ops import router
from moec.compiler.passes import run_passes
from moec.compiler.verify import verify
from moec.passes.skip_experts import SkipExperts
from moec.passes.top_k import TopK
from tests import graphs
from tests.passes.routing_models import model, routing

IDS = graphs.text().ids


@pytest.mark.parametrize("k", [1, 2, 5, [2, 6], [None, 1]])
def test_the_first_k_of_the_same_choice(k: Any) -> None:
    subject = model(normalize=False)
    changed = TopK(k=k).run(subject, graphs.context(subject))
    verify(changed.graph)
    before, after = routing(subject, IDS), routing(changed, IDS)
    for index, name in enumerate(("e", "e_b")):
        wanted = (k[index] if isinstance(k, list) else k) or 3
        assert after.ids[name].shape[-1] == wanted
    most = min(3, after.ids["e"].shape[-1])
    assert torch.equal(after.ids["e"][..., :most], before.ids["e"][..., :most])
    torch.testing.assert_close(after.weights["e"][..., :most], before.weights["e"][..., :most])


def test_what_the_weights_become() -> None:
    subject = model(normalize=False)
    context = graphs.context(subject)
    sums = {n: routing(TopK(k=2, normalize=n).run(subject, context), IDS).weights["e"].sum(-1) for n in ("keep", "renormalize", "rescale")}
    before = routing(subject, IDS).weights["e"]
    torch.testing.assert_close(sums["keep"], before[..., :2].sum(-1))
    torch.testing.assert_close(sums["renormalize"], torch.ones_like(sums["keep"]))
    assert sums["rescale"].mean() == pytest.approx(float(before.sum(-1).mean()), rel=1e-3)
    assert not torch.allclose(sums["rescale"], torch.ones_like(sums["keep"]), atol=1e-2)


def test_a_router_that_normalises_goes_on_normalising() -> None:
    subject = model()
    logits = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    for normalize in ("keep", "renormalize", "rescale"):
        changed = TopK(k=2, normalize=normalize).run(subject, graphs.context(subject))
        node = next(n for n in changed.graph.nodes if n.op == "router")
        torch.testing.assert_close(router(logits, **node.attrs)[0].sum(-1), torch.ones(5))


def test_after_skipping() -> None:
    subject = model()
    changed = run_passes(subject, [SkipExperts(rule="ratio", threshold=0.5), TopK(k=2)], graphs.context(subject))
    verify(changed.graph)
    other = run_passes(subject, [TopK(k=2), SkipExperts(rule="ratio", threshold=0.5)], graphs.context(subject))
    torch.testing.assert_close(graphs.logits(changed), graphs.logits(other))


def test_nothing_to_change_and_mistakes() -> None:
    subject = model()
    context = graphs.context(subject)
    assert TopK(k=3).run(subject, context) is subject
    with pytest.raises(MoecError, match="6 experts: k=7"):
        TopK(k=7).run(subject, context)
    with pytest.raises(MoecError, match="3 values and the model 2 MoE layers"):
        TopK(k=[1, 1, 1]).run(subject, context)
    for options in ({"k": 0}, {"k": True}, {"k": 2, "normalize": "scale"}):
        with pytest.raises(MoecError, match="top_k: "):
            TopK(**options)
