"""imatrix, hqq and decoupleq: each lowers the error that it is for."""

from __future__ import annotations

import pytest
import torch

from moec.compiler.error_feedback import Rounded, factor, objective
from moec.compiler.quantizers import get_quantizer
from moec.compiler.quantizers.decoupleq import fitted_scales
from moec.compiler.quantizers.hqq import quantize as hqq
from moec.compiler.quantizers.rtn import quantize as round_to_nearest
from moec.runtime.errors import MoecError
from moec.runtime.formats.binary import BinaryFormat
from moec.runtime.formats.int import IntFormat
from moec.runtime.formats.ternary import TernaryFormat
from tests.compiler.test_gptq import drawn

FORMATS = [IntFormat(2, 32), IntFormat(3, 64, False), IntFormat(4, 0), TernaryFormat(64), BinaryFormat(64)]


@pytest.mark.parametrize("fmt", FORMATS)
def test_imatrix_lowers_the_weighted_error(fmt: IntFormat) -> None:
    weight, _ = drawn(32, 96, 10, 0)
    importance = torch.rand(96, generator=torch.Generator().manual_seed(1)).square() + 1e-3
    found, plain = (q.values(fmt) for q in (get_quantizer("imatrix").quantize(weight, fmt, importance), round_to_nearest(weight, fmt)))
    assert float(((found - weight).square() * importance).sum()) < 0.99 * float(((plain - weight).square() * importance).sum())
    alike = get_quantizer("imatrix").quantize(weight, fmt, torch.full((96,), 3.0))
    assert torch.allclose(alike.values(fmt), plain, atol=1e-3 * float(weight.abs().max()))


@pytest.mark.parametrize("fmt", FORMATS)
def test_hqq_lowers_its_norm(fmt: IntFormat) -> None:
    weight = torch.distributions.StudentT(3.0).sample((32, 96))
    norms = [float((q.values(fmt) - weight).abs().pow(0.7).sum()) for q in (hqq(weight, fmt), round_to_nearest(weight, fmt))]
    assert norms[0] < norms[1]


@pytest.mark.parametrize("fmt", FORMATS)
def test_decoupleq_lowers_the_error_of_outputs(fmt: IntFormat) -> None:
    weight, moment = drawn(24, 96, 400, 4)
    errors = [
        float(objective(weight.T, q.values(fmt).T, moment).sum())
        for q in (get_quantizer("decoupleq").quantize(weight, fmt, moment), round_to_nearest(weight, fmt))
    ]
    assert errors[0] < 0.7 * errors[1]


def test_fitted_scales_solve_the_normal_equations() -> None:
    weight, moment = drawn(5, 80, 400, 6)
    fmt, w = IntFormat(3, 32), weight.T.contiguous()
    h, _ = factor(moment, 0.01)
    start = Rounded.of(round_to_nearest(weight, fmt), fmt)
    scale = fitted_scales(w, h, start, 32)
    for row in range(5):
        codes = torch.zeros(80, 3, dtype=torch.float64)
        for group in range(3):
            codes[group * 32 : group * 32 + 32, group] = start.codes[group * 32 : group * 32 + 32, row]
        expected = torch.linalg.solve(codes.T @ h @ codes, codes.T @ h @ w[:, row].double())
        assert torch.allclose(scale[:, row].double(), expected, rtol=2e-3)  # float16


@pytest.mark.parametrize("name", ["gptq", "decoupleq", "imatrix"])
def test_without_statistics_it_is_rounding_to_nearest(name: str) -> None:
    weight, _ = drawn(4, 40, 10, 0)
    fmt = IntFormat(3, 32)
    assert torch.equal(get_quantizer(name).quantize(weight, fmt).values(fmt), round_to_nearest(weight, fmt).values(fmt))


@pytest.mark.parametrize(("name", "options", "message"), [("hqq", {"norm": 2.0}, "norm"), ("decoupleq", {"rounds": 0}, "rounds=0")])
def test_wrong_options(name: str, options: dict[str, float], message: str) -> None:
    with pytest.raises(MoecError, match=message):
        get_quantizer(name, options).quantize(torch.ones(2, 2), IntFormat(4, 32), torch.eye(2))
