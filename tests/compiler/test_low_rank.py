"""Low-rank factors against closed forms: Eckart and Young in the norm of the inputs, and no correction that does harm."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moec.compiler.errors import MoecError
from moec.compiler.low_rank import Correction, Norm, factorize
from moec.compiler.quantizers import get_quantizer
from moec.runtime.formats import get_format
from moec.runtime.formats.int import IntFormat

SHAPES = st.sampled_from([(20, 32), (40, 24), (16, 16), (7, 33)])


def draw(shape: tuple[int, int], seed: int, samples: int = 200) -> tuple[Tensor, Tensor]:
    """A matrix, and a second moment of correlated inputs of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    n, k = shape
    x = torch.randn(samples, k, generator=generator) @ torch.randn(k, k, generator=generator) * torch.logspace(0, -2, k)
    return torch.randn(n, k, generator=generator), x.T @ x / samples


def values(parts: tuple[object, object, object], fmt: IntFormat, how: Correction) -> Tensor:
    made, left, right = parts
    factor = get_format(how.format)
    return made.values(fmt) + left.values(factor) @ right.values(factor)  # type: ignore[attr-defined, no-any-return]  # Quantized


@settings(max_examples=25, deadline=None)
@given(shape=SHAPES, rank=st.integers(1, 12), seed=st.integers(0, 99), weighted=st.booleans())
def test_the_error_is_what_eckart_and_young_say(shape: tuple[int, int], rank: int, seed: int, weighted: bool) -> None:
    matrix, moment = draw(shape, seed)
    norm = Norm.of(moment if weighted else None, shape[1])
    left, right = factorize(matrix, norm, rank)
    assert left.shape == (shape[0], rank)
    assert right.shape == (rank, shape[1])
    root = np.linalg.cholesky(norm.h.numpy())
    singular = np.linalg.svd(matrix.double().numpy() @ root, compute_uv=False)
    found = float(norm.rows(matrix - left @ right).sum())
    assert found == pytest.approx((singular[rank:] ** 2).sum(), rel=1e-4, abs=1e-6 * (singular**2).sum())


@settings(max_examples=15, deadline=None)
@given(shape=SHAPES, extra=st.integers(0, 5), seed=st.integers(0, 99))
def test_a_full_rank_leaves_nothing(shape: tuple[int, int], extra: int, seed: int) -> None:
    matrix, moment = draw(shape, seed, samples=5)  # a moment of low rank: what no input has seen is kept as well
    left, right = factorize(matrix, Norm.of(moment, shape[1]), min(shape) + extra)
    torch.testing.assert_close(left @ right, matrix, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("format", ["int8_channel", "int4_channel", "int4_g32", "int1_channel"])
@settings(max_examples=8, deadline=None)
@given(shape=SHAPES, rank=st.integers(1, 8), seed=st.integers(0, 99), rounds=st.integers(0, 2))
def test_no_row_is_worse_than_without(method: str, format: str, shape: tuple[int, int], rank: int, seed: int, rounds: int) -> None:
    matrix, moment = draw(shape, seed)
    fmt, how, norm = IntFormat(2, 32), Correction(rank, format, rounds=0), Norm.of(moment, shape[1])
    quantize = partial(get_quantizer(method).quantize, fmt=fmt, moment=moment)
    before = norm.rows(matrix - quantize(matrix).values(fmt))
    once = norm.rows(matrix - values(how.corrected(matrix, fmt, quantize, moment, rank), fmt, how))
    assert bool((once <= before * (1 + 1e-9)).all())
    again = Correction(rank, format, rounds=rounds).corrected(matrix, fmt, quantize, moment, rank)
    assert float(norm.rows(matrix - values(again, fmt, how)).sum()) <= float(once.sum()) * (1 + 1e-9)


def test_eight_bit_factors_come_near_the_bound() -> None:
    matrix, moment = draw((64, 96), 3)
    fmt, how = IntFormat(2, 32), Correction(8)
    quantize = partial(get_quantizer("rtn").quantize, fmt=fmt)
    error = matrix - quantize(matrix).values(fmt)
    norm = Norm.of(moment, 96)
    left, right = factorize(error, norm, 8)
    bound = float(norm.rows(error - left @ right).sum())
    found = float(norm.rows(matrix - values(how.corrected(matrix, fmt, quantize, moment, 8), fmt, how)).sum())
    assert bound <= found <= 1.05 * bound


def test_the_weighted_norm_is_worth_more_than_frobenius() -> None:
    matrix, moment = draw((64, 96), 4)
    norm = Norm.of(moment, 96)
    errors = [float(norm.rows(matrix - torch.matmul(*factorize(matrix, n, 8))).sum()) for n in (norm, Norm.of(None, 96))]
    assert errors[0] < 0.9 * errors[1]


def test_alternation_helps() -> None:
    matrix, moment = draw((64, 96), 5)
    fmt, norm = IntFormat(2, 32), Norm.of(moment, 96)
    quantize = partial(get_quantizer("rtn").quantize, fmt=fmt)
    damages = [
        float(norm.rows(matrix - values(how.corrected(matrix, fmt, quantize, moment, 8), fmt, how)).sum())
        for how in (Correction(8), Correction(8, rounds=3))
    ]
    assert damages[1] < damages[0]


def test_a_share_of_bytes_is_a_rank() -> None:
    how = Correction(0.1, "int8_channel")
    size = get_format("int4_g64").nbytes((384, 192))
    rank = how.rank_of(384, 192, size)
    assert how.nbytes(384, 192, rank) <= 0.1 * size < how.nbytes(384, 192, rank + 1)
    assert how.nbytes(10, 20, 3) == 10 * (3 + 2) + 3 * (20 + 2)
    assert Correction(8).rank_of(4, 100, 0) == 4


def test_bad_options() -> None:
    for options, message in (
        ({"rank": 1.5}, "expected a rank"), ({"rank": 0}, "expected a rank"), ({"format": "bf16"}, "integer format"),
        ({"rounds": -1}, "rounds"), ({"ranks": 8}, "did you mean 'rank'"),
    ):  # fmt: skip
        with pytest.raises(MoecError, match=message):
            Correction.of(options)
    assert Correction.of(None) is None
