"""Attention of many tokens on the tensor cores: blocks of tokens that share a thread block, and those that cannot."""

from __future__ import annotations

import numpy as np
import pytest

from moec.targets.kernels.cuda.attend_product import AttendProduct
from moec.targets.kernels.specs import AttentionSpec
from tests.targets.kernels.emulator import needs_emulator
from tests.targets.kernels.hardware import hardware
from tests.targets.kernels.test_attention import Cache, attend, expected, random_sequence

pytestmark = needs_emulator

ALONE = AttentionSpec(2, 2, 32, 40, 0.2, window=45)  # four blocks of tokens are 64 rows
GROUP = AttentionSpec(16, 2, 16, 8, 0.3, chunk=40, softcap=3.0, sinks=True)  # a block of tokens is twice as many rows
THREE = AttentionSpec(3, 1, 48, 64, 0.2)  # and 48 rows


@pytest.mark.parametrize("name", ["ALONE", "GROUP", "THREE"])
def test_pieces_of_all_sizes(name: str) -> None:
    spec, rng = globals()[name], np.random.default_rng(0)
    assert AttendProduct.fits(spec, "float32", 96 << 10)
    lengths = [150, 33, 97, 20]
    sequences = [random_sequence(spec, n, rng) for n in lengths]
    sinks = rng.standard_normal(spec.heads).astype(np.float32)
    run, cache = hardware("cuda").attention(spec, None), Cache(hardware("cuda"), spec, len(lengths), rng)
    calls = [
        [(0, 0, 100)],  # six blocks of tokens and four tokens more
        [(0, 100, 101), (1, 0, 17), (2, 0, 64), (3, 0, 1)],
        [(2, 64, 65), (0, 101, 102), (3, 1, 2), (1, 17, 18)],
        [(3, 2, 20), (0, 102, 150), (2, 65, 97), (1, 18, 33)],
    ]
    for parts in calls:
        for (i, begin, end), found in zip(parts, attend(run, spec, cache, sequences, parts, sinks), strict=True):
            wanted = expected(spec, sequences[i], sinks)[begin:end]
            np.testing.assert_allclose(found, wanted, atol=3e-5, err_msg=f"{i}: {begin} to {end}")
            assert np.sqrt(np.mean((found - wanted) ** 2)) < 4e-6  # two terms of bfloat16 have 16 bits
