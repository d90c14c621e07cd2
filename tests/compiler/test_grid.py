"""The scales of binary and ternary groups against closed forms, brute force and what importances mean."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.compiler.grid import fit, nearest, round_to_nearest
from moec.runtime.formats.binary import BinaryFormat
from moec.runtime.formats.int import IntFormat
from moec.runtime.formats.ternary import TernaryFormat

HALF = 2.0**-10
"""float16 rounds a scale by less than this, relatively."""


def drawn(k: int, seed: int, weighted: bool) -> tuple[np.ndarray, np.ndarray]:
    """A group of k weights with a few outliers, and what each counts."""
    rng = np.random.default_rng(seed)
    return rng.standard_t(3, k).astype(np.float32), (rng.random(k) ** 2 + 1e-3 if weighted else np.ones(k)).astype(np.float32)


def scale_of(weight: np.ndarray, counts: np.ndarray, fmt: IntFormat) -> float:
    return float(fit(torch.from_numpy(weight)[None], fmt, torch.from_numpy(counts)[None])[0])


@given(k=st.integers(1, 70), seed=st.integers(0, 9999), weighted=st.booleans())
def test_binary_scale_is_the_mean_magnitude(k: int, seed: int, weighted: bool) -> None:
    weight, counts = drawn(k, seed, weighted)
    expected = float((np.abs(weight) * counts).sum() / counts.sum())
    assert scale_of(weight, counts, BinaryFormat(0)) == pytest.approx(expected, rel=HALF)


@settings(max_examples=60, deadline=None)
@given(k=st.integers(1, 7), seed=st.integers(0, 9999), weighted=st.booleans())
def test_ternary_scale_is_the_best_of_all(k: int, seed: int, weighted: bool) -> None:
    weight, counts = drawn(k, seed, weighted)
    least = float((counts * weight**2).sum())
    for codes in product((-1, 0, 1), repeat=k):  # every choice of codes with its own best scale
        q = np.array(codes)
        if (length := float((counts * q * q).sum())) > 0:
            least = min(least, float((counts * weight**2).sum() - (counts * weight * q).sum() ** 2 / length))
    scale = scale_of(weight, counts, TernaryFormat(0))
    found = float((counts * (weight - scale * np.clip(np.round(weight / scale), -1, 1)) ** 2).sum())
    assert found <= least * (1 + 1e-4) + float((counts * weight**2).sum()) * HALF**2


@given(k=st.integers(2, 300), seed=st.integers(0, 9999))
def test_ternary_scale_is_where_its_own_codes_put_it(k: int, seed: int) -> None:
    weight, counts = drawn(k, seed, True)
    scale = scale_of(weight, counts, TernaryFormat(0))
    inside = np.abs(weight) > scale / 2 * (1 + HALF)
    edge = np.abs(np.abs(weight) - scale / 2) <= scale * HALF  # a weight that the rounding of the scale may move across
    if not edge.any():
        assert scale == pytest.approx(float((counts * np.abs(weight))[inside].sum() / counts[inside].sum()), rel=HALF)


def test_the_errors_of_a_normal_distribution() -> None:
    """1 - 2 / pi of the variance for two values, 0.1902 for three: the best scalar quantisers that are symmetric (Max, 1960)."""
    weight = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
    for fmt, expected in ((BinaryFormat(0), 1 - 2 / np.pi), (TernaryFormat(0), 0.1902)):
        error = (round_to_nearest(weight, fmt).values(fmt) - weight).square().mean()
        assert float(error) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("fmt", [BinaryFormat(32), TernaryFormat(32), IntFormat(2, 32), IntFormat(3, 32, False)])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_short_last_group_is_fitted_to_what_it_has(fmt: IntFormat, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    weight, importance = torch.randn(9, 69, generator=generator), torch.rand(69, generator=generator) + 0.1
    found = round_to_nearest(weight, fmt, importance if weighted else None)
    last = round_to_nearest(weight[:, 64:].contiguous(), fmt, importance[64:] if weighted else None)
    np.testing.assert_allclose(found.scale[:, 2].astype(float), last.scale[:, 0].astype(float), rtol=2 * HALF)
    assert (found.codes[:, 64:] == last.codes).mean() > 0.97  # a weight halfway may go either way


@pytest.mark.parametrize("fmt", [BinaryFormat(16), TernaryFormat(16)])
def test_zeros_stay_next_to_zero(fmt: IntFormat) -> None:
    assert round_to_nearest(torch.zeros(2, 40), fmt).values(fmt).abs().max() <= 2.0**-24


@given(seed=st.integers(0, 99))
def test_binary_codes_are_signs(seed: int) -> None:
    weight = torch.randn(3, 20, generator=torch.Generator().manual_seed(seed)) * 1e-9
    codes = nearest(weight, torch.ones(3, 1), torch.ones(3, 1), BinaryFormat(0))
    assert torch.equal(codes, weight.sign())
    assert (round_to_nearest(weight, BinaryFormat(0)).codes == np.where(weight.numpy() >= 0, 2, 0)).all()
