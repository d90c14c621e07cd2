"""Distillation of a few numbers: closer to the reference, with the same graph and the same codes."""

from __future__ import annotations

import pytest
import torch

from moec.compiler.context import Context
from moec.compiler.damage import each_logits
from moec.compiler.errors import MoecError
from moec.compiler.model import Model
from moec.compiler.packed import coded_format
from moec.compiler.tuning import trained
from moec.compiler.weights import packed_of
from moec.passes.quantize import Quantize
from moec.passes.tune_routers import TuneRouters
from tests import graphs

UP, DOWN, GATE = "layers.0.experts.up", "layers.0.experts.down", "layers.0.gate.weight"


def quantized() -> tuple[Model, Model, Context]:
    model = graphs.model()
    return model, Quantize(experts="int2_g32").run(model, Context()), graphs.context(model)


@pytest.mark.parametrize("what", [["router"], ["router", "norm", "scale"]])
def test_tuning_brings_the_model_closer_on_text_it_has_not_seen(what: list[str]) -> None:
    _, compressed, context = quantized()
    result = TuneRouters(steps=15, what=what, rate=1e-2).run(compressed, context)
    note = context.journal[-1]
    assert note["kept"]
    assert note["heldout_kl_after"] < 0.97 * note["heldout_kl_before"]
    assert note["heldout_kl_after"] == pytest.approx(context.damage(result, "").kl_divergence)
    assert result.graph == compressed.graph
    for name in (UP, DOWN):
        for expert in range(6):
            before, after = (packed_of(m.weights, name, expert) for m in (compressed, result))
            assert before is not None and after is not None
            assert (before.codes == after.codes).all() and (before.zero == after.zero).all()
            assert (before.scale != after.scale).any() == ("scale" in what)
            fmt = coded_format(result.graph.params[name], expert)
            assert fmt is not None
            torch.testing.assert_close(result.load(name, expert), after.values(fmt))
    assert not torch.equal(result.load(GATE), compressed.load(GATE))


def test_the_text_itself_can_be_the_teacher() -> None:
    model = graphs.model()
    context = graphs.context(model)
    text = context.need_text("test")
    result = TuneRouters(steps=20, what=["router", "norm"], loss="text", windows=len(text.ids), rate=1e-2).run(model, context)
    note = context.journal[-1]
    parts: list[torch.Tensor] = []
    each_logits(model, text.ids, lambda _, part: parts.append(part.log_softmax(-1)))
    nll = -torch.cat(parts)[:, :-1].gather(-1, text.ids[:, 1:, None]).mean()
    assert note["first_loss"] == pytest.approx(float(nll), rel=1e-4) and note["last_loss"] < note["first_loss"]
    assert note["kept"] == (note["heldout_nll_after"] < note["heldout_nll_before"]) == (result is not model)


def test_weights_made_of_leaves_are_the_weights() -> None:
    _, compressed, _ = quantized()
    found = trained(compressed, ["scale"])
    for name in (UP, DOWN):
        for expert in range(6):
            torch.testing.assert_close(found.leaves[name][expert].detach(), compressed.load(name, expert))


def test_worse_results_are_not_kept() -> None:
    _, compressed, context = quantized()
    assert TuneRouters(steps=2, rate=100.0).run(compressed, context) is compressed
    assert not context.journal[-1]["kept"]


def test_bad_options() -> None:
    _, compressed, context = quantized()
    assert TuneRouters().run(compressed, context) is compressed
    with pytest.raises(MoecError, match="did you mean 'router'"):
        TuneRouters(what=["routers"])
    with pytest.raises(MoecError, match="unknown loss of tune_routers 'nll'"):
        TuneRouters(loss="nll")
    with pytest.raises(MoecError, match="expected a list"):
        TuneRouters(what="router")
    with pytest.raises(MoecError, match="rates above 0"):
        TuneRouters(rate=0)
    with pytest.raises(MoecError, match="nothing of the kinds scale"):
        TuneRouters(steps=1, what=["scale"]).run(graphs.model(), context)
