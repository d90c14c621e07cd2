"""GPTQ against a plain loop, against rounding to nearest, and on weights that need no rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moec.compiler.error_feedback import descend, factor, objective, round_with_feedback
from moec.compiler.grid import fit, nearest
from moec.compiler.quantizers import get_quantizer
from moec.compiler.quantizers.gptq import quantize
from moec.compiler.quantizers.rtn import quantize as round_to_nearest
from moec.runtime.errors import MoecError
from moec.runtime.formats.binary import BinaryFormat
from moec.runtime.formats.int import IntFormat
from moec.runtime.formats.ternary import TernaryFormat

GROUPS = st.sampled_from([0, 32, 64])
FORMATS = st.one_of(
    st.builds(IntFormat, st.integers(1, 8), GROUPS, st.booleans()), st.builds(TernaryFormat, GROUPS), st.builds(BinaryFormat, GROUPS)
)


def drawn(n: int, k: int, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """A weight [n, k] and the moment of correlated inputs, some of which are never seen."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, k, generator=generator) @ torch.randn(k, k, generator=generator) / k**0.5 + 0.3
    x *= torch.rand(k, generator=generator) * 2
    x[:, seed % k] = 0
    return torch.randn(n, k, generator=generator), (x.T @ x).double() / tokens


def plain_gptq(w: Tensor, h: Tensor, fmt: IntFormat) -> Tensor:
    """Optimal brain quantisation in a fixed order, the inverse made anew for every channel: values [K, N] for w [K, N]."""
    w, values, size = w.clone(), torch.zeros_like(w), fmt.group_size(len(w))
    for i in range(len(w)):
        if i % size == 0:
            group = slice(i, min(i + size, len(w)))
            scale, zero = fit(w[group].T.contiguous(), fmt, h.diagonal()[None, group])
        inverse = torch.linalg.inv(h[i:, i:])
        values[i] = nearest(w[i], scale[:, 0], zero[:, 0], fmt) * scale[:, 0]
        w[i:] -= inverse[0, :, None] * ((w[i] - values[i]) / inverse[0, 0])
    return values


@pytest.mark.parametrize(
    "fmt", [IntFormat(3, 16), IntFormat(2, 32, False), IntFormat(4, 0), IntFormat(2, 64), TernaryFormat(16), BinaryFormat(32)]
)
def test_equal_to_a_plain_loop(fmt: IntFormat) -> None:
    weight, moment = drawn(7, 72, 300, 3)
    w = weight.T.contiguous().double()
    h, r = factor(moment, 0.01)
    assert torch.allclose(r @ r.T, h)
    found = round_with_feedback(w, h, r, fmt, range(fmt.groups(72)), block=20)
    assert torch.allclose(found.values(fmt.group_size(72)), plain_gptq(w, h, fmt), rtol=0, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(
    fmt=FORMATS, n=st.integers(1, 9), k=st.integers(1, 150), tokens=st.sampled_from([1, 40, 400]), seed=st.integers(0, 999),
    act_order=st.booleans(), sweeps=st.integers(0, 3),
)  # fmt: skip
def test_never_worse_than_nearest(fmt: IntFormat, n: int, k: int, tokens: int, seed: int, act_order: bool, sweeps: int) -> None:
    weight, moment = drawn(n, k, tokens, seed)
    found = quantize(weight, fmt, moment, act_order=act_order, sweeps=sweeps)
    assert found.codes.shape == (n, k)
    assert found.codes.max() <= fmt.top
    assert found.scale.shape == found.zero.shape == (n, fmt.groups(k))
    assert np.isfinite(found.scale).all()
    if fmt.symmetric:
        assert (found.zero == fmt.middle).all()
    errors = [objective(weight.T, q.values(fmt).T, moment) for q in (found, round_to_nearest(weight, fmt))]
    assert (errors[0] <= errors[1] * (1 + 1e-9) + 1e-12).all()


@pytest.mark.parametrize("fmt", [IntFormat(2, 32), TernaryFormat(32), TernaryFormat(0), BinaryFormat(32)])
def test_each_step_lowers_the_error(fmt: IntFormat) -> None:
    weight, moment = drawn(64, 128, 500, 1)
    errors = [float(objective(weight.T, quantize(weight, fmt, moment, sweeps=sweeps).values(fmt).T, moment).sum()) for sweeps in (0, 1, 3)]
    nearest_error = float(objective(weight.T, round_to_nearest(weight, fmt).values(fmt).T, moment).sum())
    assert errors[0] < 0.7 * nearest_error
    assert errors[1] < 0.95 * errors[0]
    assert errors[2] < errors[1]


@pytest.mark.parametrize("fmt", [IntFormat(2, 32, True), IntFormat(2, 32, False), TernaryFormat(32), BinaryFormat(32)])
def test_descent_never_rises(fmt: IntFormat) -> None:
    weight, moment = drawn(20, 96, 300, 2)
    w = weight.T.contiguous()
    h, r = factor(moment, 0.01)
    found = round_with_feedback(w, h, r, fmt, range(3))
    errors = [objective(w, found.values(32), h)]
    for _ in range(4):
        found = descend(w, h, fmt, found, 1)
        errors.append(objective(w, found.values(32), h))
        assert (errors[-1] <= errors[-2] * (1 + 1e-5)).all()


def test_exact_where_codes_can_say_it() -> None:
    rng = np.random.default_rng(0)
    _, moment = drawn(1, 64, 200, 5)
    for symmetric in (True, False):
        fmt = IntFormat(4, 32, symmetric)
        codes = rng.integers(0, 16, (4, 64)).astype(np.uint8)
        codes[:, ::32], codes[:, 1::32] = 0, 15  # both ends are used
        weight = fmt.dequantize(codes, np.full((4, 2), 0.25, np.float16), np.full((4, 2), 8, np.uint8))
        assert np.array_equal(quantize(torch.from_numpy(weight), fmt, moment).values(fmt).numpy(), weight)


def test_inputs_never_seen() -> None:
    weight, _ = drawn(4, 40, 10, 0)
    fmt = IntFormat(3, 32)
    found = quantize(weight, fmt, torch.zeros(40, 40))
    assert torch.equal(found.values(fmt), round_to_nearest(weight, fmt).values(fmt))


def test_wrong_option() -> None:
    with pytest.raises(MoecError, match="damp=-1"):
        get_quantizer("gptq", {"damp": -1}).quantize(torch.ones(2, 2), IntFormat(4, 32), torch.eye(2))
