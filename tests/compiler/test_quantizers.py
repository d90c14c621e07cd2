"""Round to nearest with a clipping search."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.compiler.packed import Quantized
from moec.compiler.quantizers import get_quantizer, known_quantizers
from moec.compiler.quantizers.rtn import quantize
from moec.runtime.errors import MoecError
from moec.runtime.formats.binary import BinaryFormat
from moec.runtime.formats.int import IntFormat
from moec.runtime.formats.ternary import TernaryFormat


def plain_round_to_nearest(weight: np.ndarray, fmt: IntFormat) -> float:
    """The squared error of symmetric rounding with the scale that covers each group, written with plain loops."""
    error, size, top = 0.0, fmt.group_size(weight.shape[1]), fmt.levels // 2 - 1
    for row in weight:
        for start in range(0, len(row), size):
            group = row[start : start + size]
            scale = np.abs(group).max() / max(top, 1) or 1.0
            codes = np.clip(np.round(group / scale), -top - 1, top)
            error += float(((codes * scale - group) ** 2).sum())
    return error


@settings(max_examples=40, deadline=None)
@given(
    bits=st.integers(2, 8), group=st.sampled_from([0, 32, 64]), symmetric=st.booleans(),
    n=st.integers(1, 9), k=st.integers(1, 150), seed=st.integers(0, 999), spread=st.sampled_from([1e-9, 1e-3, 1.0, 1e3]),
)  # fmt: skip
def test_never_worse_than_plain_rounding(bits: int, group: int, symmetric: bool, n: int, k: int, seed: int, spread: float) -> None:
    fmt = IntFormat(bits, group, symmetric)
    weight = torch.from_numpy(np.random.default_rng(seed).standard_t(4, (n, k)).astype(np.float32)) * spread
    packed = quantize(weight, fmt)
    assert packed.codes.shape == (n, k)
    assert packed.scale.shape == packed.zero.shape == (n, fmt.groups(k))
    assert packed.codes.max() < fmt.levels
    assert np.isfinite(packed.scale).all()
    assert (packed.scale != 0).all()
    found = ((fmt.dequantize(packed.codes, packed.scale, packed.zero) - weight.numpy()) ** 2).sum()
    if symmetric and spread >= 1:  # below, float16 has few digits left for the scale
        rounded_scale = float((weight**2).sum()) * 2.0**-21
        assert found <= plain_round_to_nearest(weight.numpy(), fmt) * (1 + 1e-2) + rounded_scale


def test_exact_where_codes_can_say_it() -> None:
    rng = np.random.default_rng(0)
    for symmetric in (True, False):
        fmt = IntFormat(4, 32, symmetric)
        codes = rng.integers(0, 16, (4, 64)).astype(np.uint8)
        codes[:, ::32], codes[:, 1::32] = 0, 15  # both ends are used
        scale, zero = np.full((4, 2), 0.25, np.float16), np.full((4, 2), 8, np.uint8)
        weight = fmt.dequantize(codes, scale, zero)
        packed = quantize(torch.from_numpy(weight), fmt)
        assert np.array_equal(fmt.dequantize(packed.codes, packed.scale, packed.zero), weight)


def test_zeros_stay_zero() -> None:
    for symmetric in (True, False):
        fmt = IntFormat(3, 32, symmetric)
        packed = quantize(torch.zeros(2, 40), fmt)
        assert not fmt.dequantize(packed.codes, packed.scale, packed.zero).any()


@pytest.mark.parametrize("name", known_quantizers())
@pytest.mark.parametrize(
    "fmt",
    [
        IntFormat(1, 32),
        IntFormat(2, 32, False),
        IntFormat(3, 64),
        IntFormat(8, 0),
        IntFormat(4, 16, False),
        TernaryFormat(32),
        BinaryFormat(64),
    ],
)
def test_every_quantizer_makes_what_the_format_can_store(name: str, fmt: IntFormat) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(6, 72, generator=generator), torch.randn(200, 72, generator=generator)
    quantizer = get_quantizer(name)
    moment = {"none": None, "diagonal": x.square().mean(0), "full": x.T @ x / 200}[quantizer.needs]
    found = quantizer.quantize(weight, fmt, moment)
    assert found.codes.dtype == found.zero.dtype == np.uint8
    assert found.scale.dtype == np.float16
    again = Quantized(*fmt.codes(fmt.pack(found.codes, found.scale, found.zero), (6, 72)))
    assert torch.equal(again.values(fmt), found.values(fmt))
    assert float((found.values(fmt) - weight).square().mean()) < (0.8 if fmt.bits == 1 else 0.35)


def test_unknown_quantizer() -> None:
    with pytest.raises(MoecError, match="did you mean 'rtn'"):
        get_quantizer("rtm")
