"""The kernels of norms, rope, router and top-k against `moec.compiler.ops` in float64."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.compiler import ops
from moec.targets.kernels.specs import NormSpec, RouterSpec
from tests.targets.kernels.hardware import KINDS, hardware

ROUTERS = [
    RouterSpec(16, 4, normalize=True),
    RouterSpec(6, 2),
    RouterSpec(64, 8, "sigmoid", normalize=True, scale=2.5, groups=8, top_groups=4, group_score="top2", bias=True),
    RouterSpec(40, 3, "softmax_topk"),
    RouterSpec(9, 4, "identity", normalize=True),
    RouterSpec(24, 3, groups=4, top_groups=2),
    RouterSpec(5, 5, "sigmoid"),
    RouterSpec(256, 8, "sigmoid", normalize=True, scale=2.5, groups=8, top_groups=4, group_score="top2", bias=True),
    RouterSpec(160, 6, groups=8, top_groups=3, scale=16.0),
]


def floats(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def double(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x).double()


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(index=st.sampled_from(range(len(ROUTERS))), seed=st.integers(0, 10_000), tokens=st.integers(1, 40), spread=st.floats(0.1, 20))
def test_router(kind: str, index: int, seed: int, tokens: int, spread: float) -> None:
    spec = ROUTERS[index]
    logits, bias = floats(tokens, spec.experts, seed=seed) * np.float32(spread), floats(spec.experts, seed=seed + 1) * np.float32(0.1)
    attrs = {name: value for name, value in asdict(spec).items() if name not in ("experts", "bias")}
    expected, ids = ops.router(torch.from_numpy(logits), torch.from_numpy(bias) if spec.bias else None, **attrs)
    shape = (tokens, spec.top_k)
    weights, found = hardware(kind).router(spec, None)(
        logits, *([bias] if spec.bias else []), outputs=[(shape, "float32"), (shape, "int64")]
    )
    # Scores that float32 cannot tell apart may come in either order.
    order = np.argsort(found, -1), np.argsort(ids.numpy(), -1)
    same = (np.take_along_axis(found, order[0], -1) == np.take_along_axis(ids.numpy(), order[1], -1)).all(-1)
    scores = np.sort(weights, -1), np.sort(expected.numpy(), -1)
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-5 * spec.scale, rtol=1e-4)
    assert same.mean() > 0.9


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("index", range(len(ROUTERS)))
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 0.0])
def test_router_ids_are_valid_and_ties_go_to_the_lower_id(kind: str, index: int, value: float) -> None:
    spec = ROUTERS[index]
    logits = np.full((2, spec.experts), value, np.float32)
    bias = [np.zeros(spec.experts, np.float32)] if spec.bias else []
    shape = (2, spec.top_k)
    _, ids = hardware(kind).router(spec, None)(logits, *bias, outputs=[(shape, "float32"), (shape, "int64")])
    assert (np.sort(ids, -1) == np.arange(spec.top_k)).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("largest", [True, False])
def test_topk(kind: str, largest: bool) -> None:
    x = floats(30, 40)
    values, indices = hardware(kind).topk(40, 3, largest)(x, outputs=[((30, 3), "float32"), ((30, 3), "int64")])
    expected = torch.from_numpy(x).topk(3, -1, largest)
    np.testing.assert_array_equal(indices, expected.indices.numpy())
    np.testing.assert_array_equal(values, expected.values.numpy())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, None])
@pytest.mark.parametrize(
    "spec",
    [
        NormSpec(384, 1, 1e-5, residual=True),
        NormSpec(20, 3, 1e-5, offset=1.0),
        NormSpec(64, 2, 1e-6, center=True, bias=True),
        NormSpec(7, 2, 1e-5, weight=False),
    ],
)
def test_norms(kind: str, spec: NormSpec, tokens: int | None) -> None:
    count, width = tokens or 37, spec.size * spec.groups
    x, residual, weight, bias = floats(count, width), floats(count, width, seed=1), floats(spec.size), floats(spec.size, seed=3)
    inputs = [x, *([residual] if spec.residual else []), *([weight] if spec.weight else []), *([bias] if spec.bias else [])]
    *total, found = hardware(kind).norm(spec, tokens)(*inputs, outputs=[((count, width), "float32")] * (1 + spec.residual))
    whole = x + residual if spec.residual else x
    for each in total:
        np.testing.assert_array_equal(each, whole)
    rows, scale = double(whole).view(count, spec.groups, spec.size), double(weight) if spec.weight else None
    if spec.center:
        expected = ops.layer_norm(rows, scale, double(bias), eps=spec.eps)
    else:
        expected = ops.rms_norm(rows, scale, eps=spec.eps, offset=spec.offset)
    np.testing.assert_allclose(found, expected.view(count, -1).numpy(), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, None])
@pytest.mark.parametrize(("heads", "d"), [(3, 64), (2, 12)])
def test_rope(kind: str, heads: int, d: int, tokens: int | None) -> None:
    count = tokens or 21
    x, cos, sin = floats(count, heads * d), floats(count, d, seed=1), floats(count, d, seed=2)
    (found,) = hardware(kind).rope(heads, d, tokens)(x, cos, sin, outputs=[((count, heads * d), "float32")])
    expected = ops.rope(double(x).view(1, count, heads, d), double(cos)[None], double(sin)[None])
    np.testing.assert_allclose(found, expected.view(count, -1).numpy(), atol=1e-5)
