"""The kernel of skip against `moec.compiler.ops.skip` in float32: the same ids, and the same weights bit for bit."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.compiler import ops
from moec.targets.kernels.specs import SkipSpec
from tests.targets.kernels.hardware import KINDS, hardware

SPECS = [
    SkipSpec(2, 8, ratio=0.5),
    SkipSpec(8, 64, ratio=0.3, top_p=0.75, normalize=True, counts=True),
    SkipSpec(6, 60, top_p=0.8, normalize=True),
    SkipSpec(4, 16, counts=True, normalize=True),
    SkipSpec(1, 4, ratio=1.0, top_p=0.1),
    SkipSpec(3, 5, normalize=True),
]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(
    index=st.sampled_from(range(len(SPECS))), seed=st.integers(0, 10_000), tokens=st.sampled_from([1, 3, 40, 700]),
    levels=st.sampled_from([4, 10, 1 << 20]),
)  # fmt: skip
def test_skip(kind: str, index: int, seed: int, tokens: int, levels: int) -> None:
    spec, rng = SPECS[index], np.random.default_rng(seed)
    # Multiples of a tenth and the like: rules meet many ties, some of which only the same roundings decide alike.
    weights = np.sort(rng.integers(0, levels + 1, (tokens, spec.top_k)).astype(np.float32) / np.float32(levels))[:, ::-1].copy()
    weights[rng.random(tokens) < 0.1, -1] = np.nan
    ids = rng.integers(0, spec.experts, weights.shape)
    counts = rng.integers(-1, spec.top_k + 2, (tokens, 1))
    attrs = {name: value for name, value in asdict(spec).items() if name not in ("top_k", "counts")}
    expected = ops.skip(torch.from_numpy(weights), torch.from_numpy(ids), torch.from_numpy(counts) if spec.counts else None, **attrs)
    outputs = [(weights.shape, "float32"), (weights.shape, "int64")]
    found = hardware(kind).skip(spec, 1 if tokens == 1 else None)(weights, ids, *([counts] if spec.counts else []), outputs=outputs)
    np.testing.assert_array_equal(found[1], expected[1].numpy())
    np.testing.assert_array_equal(found[0], expected[0].numpy())
