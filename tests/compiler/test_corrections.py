"""Quantised experts with low-rank factors of what their codes lose: the codes, the model's function, the bytes, interruptions."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from moec.compiler.calibration.capture import capture
from moec.compiler.calibration.collect import expert_outputs
from moec.compiler.context import Context
from moec.compiler.corrections import with_corrections
from moec.compiler.errors import MoecError
from moec.compiler.layers import moe_layers
from moec.compiler.low_rank import Correction
from moec.compiler.model import Model
from moec.compiler.moments import moment_of
from moec.compiler.packed import Quantized
from moec.compiler.plan import param_bytes
from moec.compiler.quantizers import get_quantizer
from moec.compiler.roles import parameter_roles
from moec.compiler.split_experts import uniform_experts
from moec.compiler.stored import as_stored
from moec.compiler.tuning import trained
from moec.compiler.verify import verify
from moec.compiler.weights import packed_of
from moec.passes.assign_bits import AssignBits
from moec.passes.quantize import Quantize
from moec.runtime.formats.int import IntFormat
from tests import graphs

UP, DOWN = "layers.0.experts.up", "layers.0.experts.down"
NAMES = tuple(f"{name}{end}" for name in (UP, DOWN) for end in ("", ".left", ".right"))


def codes(model: Model, name: str, expert: int) -> Quantized:
    found = packed_of(model.weights, name, expert)
    assert found is not None
    return found


def kl(model: Model, context: Context) -> float:
    return context.damage(as_stored(model), "test").kl_divergence


def test_zero_factors_change_nothing() -> None:
    model = Quantize(experts="int3_g32").run(graphs.model(), Context())
    found, corrections = with_corrections(model, [UP, DOWN], Correction(4))
    verify(found.graph)
    assert set(corrections) == {UP, DOWN}
    torch.testing.assert_close(graphs.logits(found), graphs.logits(model), rtol=0, atol=0)


@pytest.mark.parametrize(("fmt", "method"), [("int2_g32", "rtn"), ("int2_g32", "gptq"), ("ternary_g32", "gptq"), ("binary_g32", "rtn")])
def test_factors_at_full_rank_leave_their_own_rounding(fmt: str, method: str) -> None:
    source = graphs.model()
    context = graphs.context(source)
    damages = [
        kl(Quantize(experts=fmt, method=method, low_rank=low_rank).run(source, context), context)
        for low_rank in (None, {"rank": 2}, {"rank": 12}, {"rank": 16})
    ]
    assert damages[0] > damages[1] > damages[2] > damages[3]
    assert damages[3] < 0.01 * damages[0]


def test_without_text_the_norm_is_frobenius() -> None:
    source = graphs.model()
    low_rank = {"rank": 3, "format": "int4_channel", "weighted": False}
    made = Quantize(experts="int2_g32", low_rank=low_rank).run(source, Context())
    fmt, how = IntFormat(2, 32), Correction(3, "int4_channel", weighted=False)
    for expert in (0, 5):
        weight = source.load(UP, expert)
        parts = how.corrected(weight, fmt, partial(get_quantizer("rtn").quantize, fmt=fmt), None, 3)
        for name, expected in zip((UP, f"{UP}.left", f"{UP}.right"), parts, strict=True):
            assert np.array_equal(codes(made, name, expert).codes, expected.codes)
        assert torch.equal(made.load(f"{UP}.left")[expert], made.load(f"{UP}.left", expert))
    assert {made.graph.params[name].format for name in NAMES} == {"int2_g32", "int4_channel"}


@pytest.mark.parametrize("sequential", [True, False])
def test_the_moments_are_those_of_the_corrected_model(sequential: bool) -> None:
    source = graphs.model()
    context = graphs.context(source)
    low_rank = {"rank": 3, "rounds": 1}
    made = Quantize(experts="int2_g32", method="gptq", sequential=sequential, low_rank=low_rank).run(source, context)
    layer = moe_layers(made.graph)[0]
    found = capture(source, context.need_text("x"), 10**6)[layer.name]
    fmt, how = IntFormat(2, 32), Correction(3, rounds=1)
    runs = made if sequential else source
    expert = int(torch.bincount(found.rows.flatten()).argmax())
    token, slot = torch.where(found.rows == expert)
    assert len(token) >= 32  # so many that none of the other tokens' moments are mixed in
    h = expert_outputs(runs, moe_layers(runs.graph)[0], expert, found.x[token])[1]
    for name, rows in ((UP, found.x[token]), (DOWN, h)):
        moment = moment_of([rows], found.weights[token, slot])
        quantize = partial(get_quantizer("gptq").quantize, fmt=fmt, moment=moment)
        parts = how.corrected(source.load(name, expert), fmt, quantize, moment, 3)
        for part, expected in zip((name, f"{name}.left", f"{name}.right"), parts, strict=True):
            assert (codes(made, part, expert).codes == expected.codes).mean() > 0.97


def test_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    source = graphs.model()
    context = graphs.context(source)
    context.work = tmp_path
    steps = [Quantize(experts="int2_g32", method="gptq", low_rank={"rank": rank}) for rank in (2, 2, 3)]
    first, again, other = (step.run(source, context) for step in steps)
    assert len(list((tmp_path / "codes").iterdir())) == 2
    for name in NAMES:
        assert np.array_equal(codes(first, name, 3).codes, codes(again, name, 3).codes)
    assert other.graph.params[f"{UP}.right"].type.shape == (6, 3, 16)


def test_assigned_bits_hold_the_factors() -> None:
    source = graphs.model()
    context = graphs.context(source)
    formats = ("int2_channel", "int4_channel", "int8_channel")
    total = 6 * (24 * 16 + 16 * 12)
    for low_rank in ({"rank": 2, "format": "int4_channel"}, {"rank": 0.4, "format": "int4_channel"}):
        made = AssignBits(budget=8.5, formats=formats, objective="hessian", method="gptq", low_rank=low_rank).run(source, context)
        verify(made.graph)
        experts = [p for name, p in made.graph.params.items() if parameter_roles(made.graph)[name] == "experts"]
        assert {p.name for p in experts} == set(NAMES)
        assert sum(map(param_bytes, experts)) <= 8.5 / 8 * total
        split = uniform_experts(made)
        verify(split.graph)
        torch.testing.assert_close(graphs.logits(split), graphs.logits(made), rtol=1e-6, atol=1e-6)
    with pytest.raises(MoecError, match="smallest of the formats"):
        AssignBits(budget=4.5, formats=formats, low_rank={"rank": 8}).run(source, context)


def test_factors_that_are_the_whole_matrix_are_quantised_with_their_own_inputs() -> None:
    source = graphs.factored(graphs.model(), (6, 6), whole=False)
    context = graphs.context(source)
    damages = []
    for method in ("rtn", "gptq"):
        made = Quantize(experts="int3_g32", method=method).run(source, context)
        verify(made.graph)
        assert {name: made.graph.params[name].format for name in NAMES} == {n: "zero" if n in (UP, DOWN) else "int3_g32" for n in NAMES}
        damages.append(kl(made, context))
    assert 0 < damages[1] < damages[0]


def test_scales_of_factors_can_be_tuned() -> None:
    source = graphs.model()
    made = Quantize(experts="int2_g32", low_rank={"rank": 3, "weighted": False}).run(source, Context())
    found = trained(made, ["scale"])
    assert set(found.leaves) == set(NAMES)
    torch.testing.assert_close(graphs.logits(found.result()), graphs.logits(made), rtol=1e-6, atol=1e-6)


def test_bad_input() -> None:
    source = graphs.model()
    with pytest.raises(MoecError, match="weighted factors needs calibration text"):
        Quantize(experts="int4_g32", low_rank={}).run(source, Context())
    with pytest.raises(MoecError, match="quantises none"):
        Quantize(linear="int4_g32", low_rank={}).run(source, Context())
    for step in (lambda: Quantize(experts="zero"), lambda: AssignBits(formats=["int2_g64", "zero"])):
        with pytest.raises(MoecError, match="format zero keeps nothing"):
            step()
