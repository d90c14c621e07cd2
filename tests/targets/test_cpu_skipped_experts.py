"""Slots that are skipped: the CPU kernels against the interpreter's `experts`, for ids of any value and weights that must not be read."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.compiler import ops
from moec.runtime.counters import COUNTS
from moec.targets.kernels.cpu import ExpertActivation, ExpertsLayout, experts_func
from tests.cpu_kernels import ISA, Array, call, close, compile_func, draw_experts

E, K, D, F = 5, 4, 40, 24
SKIPPED = [-1, E, E + 1, 1 << 32, (1 << 32) + 2, -(1 << 32), -(1 << 63), (1 << 63) - 1]  # some are experts in 32 bits
GARBAGE = [np.nan, np.inf, -3e38]
LAYOUTS = {
    **{name: ExpertsLayout(E, D, F, name, name) for name in ("f32", "bf16", "int8_g32", "int4_g32", "int3_channel", "int2_g64_asym")},
    "plain": ExpertsLayout(E, D, F, "int4_g64", "int8_g64", gated=False),
}
BIASED = ("bf16", "int4_g32", "plain")


class Layer:
    """Experts with random weights, compiled for one token or for any number."""

    def __init__(self, name: str, tokens: int | None) -> None:
        rng = np.random.default_rng(len(name))
        self.layout, biased = LAYOUTS[name], name in BIASED
        self._up, self._down, self.stored = draw_experts(rng, self.layout)
        self._biases = tuple(rng.standard_normal((E, n), np.float32) for n in (self._up.shape[1], D)) if biased else ()
        extra = self.layout.biases(*self._biases) if len(self._biases) == 2 else ()
        self.stored += extra
        func = experts_func(self.layout, ExpertActivation("silu"), ISA, tokens=tokens, top_k=K, biases=biased, counted=True)
        self._run: Callable[..., None] = compile_func(func)

    def found(self, x: Array, ids: Array, weights: Array) -> Array:
        counts, result = tvm.runtime.tensor(np.zeros(COUNTS, np.int64)), tvm.runtime.tensor(np.full(x.shape, np.nan, np.float32))
        for _ in range(2):
            self._run(*(tvm.runtime.tensor(a) for a in (x, ids, weights, *self.stored)), counts, result)
        runs = ((ids >= 0) & (ids < E)).sum()
        assert counts.numpy().tolist() == [2 * len(x), 2 * runs] + [0] * (COUNTS - 2)
        found: Array = result.numpy()
        return found

    def expected(self, x: Array, ids: Array, weights: Array) -> Array:
        arrays = (torch.from_numpy(a) for a in (x.astype(np.float64), ids, weights.astype(np.float64), self._up, self._down))
        biases = (torch.from_numpy(b).double() for b in self._biases)
        result: Array = ops.experts(*arrays, *biases, activation="silu", gated=self.layout.gated).numpy()
        return result


layer = cache(Layer)


@st.composite
def routings(draw: st.DrawFn, tokens: st.SearchStrategy[int]) -> tuple[Array, Array]:
    """Ids and weights [T, K]: different experts for each token, any of them skipped, with garbage as their weights."""
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    ids = np.stack([rng.permutation(E)[:K] for _ in range(draw(tokens))])
    weights = rng.random(ids.shape, np.float32)
    skipped = rng.random(ids.shape) < draw(st.sampled_from([0.0, 0.3, 0.7, 1.0]))
    ids[skipped] = rng.choice(np.array(SKIPPED), skipped.sum())
    weights[skipped] = rng.choice(np.array(GARBAGE, np.float32), skipped.sum())
    return ids, weights


def check(layer: Layer, ids: Array, weights: Array) -> None:
    x = np.random.default_rng(ids.size).standard_normal((len(ids), D), np.float32)
    found, expected = layer.found(x, ids, weights), layer.expected(x, ids, weights)
    idle = ((ids < 0) | (ids >= E)).all(1)
    assert not found[idle].any()
    assert not expected[idle].any()
    if not idle.all():
        close(found[~idle], expected[~idle], layer.layout.down, steps=2)


@pytest.mark.parametrize("name", LAYOUTS)
@settings(max_examples=20, deadline=None)
@given(routing=routings(st.just(1)))
def test_one_token(name: str, routing: tuple[Array, Array]) -> None:
    check(layer(name, 1), *routing)


@pytest.mark.parametrize("name", ["f32", "int4_g32"])
@settings(max_examples=20, deadline=None)
@given(routing=routings(st.integers(1, 40)))
def test_many_tokens(name: str, routing: tuple[Array, Array]) -> None:
    check(layer(name, None), *routing)


def test_blocks_of_which_one_is_skipped() -> None:
    rng = np.random.default_rng(7)
    ids = np.stack([rng.permutation(E)[:K] for _ in range(1100)])
    weights = rng.random(ids.shape, np.float32)
    ids[512:1024], weights[512:1024] = E, np.nan
    check(layer("f32", None), ids, weights)


def test_ids_of_32_bits() -> None:
    ids = np.array([[-1, 3, E, 0]], np.int32)
    weights = np.array([[np.nan, 0.5, np.nan, 0.25]], np.float32)
    x, held = np.random.default_rng(3).standard_normal((1, D), np.float32), layer("f32", 1)
    func = experts_func(held.layout, ExpertActivation("silu"), ISA, tokens=1, top_k=K, ids_dtype="int32")
    found = call(compile_func(func), x, ids, weights, *held.stored, out=(1, D))
    close(found, held.expected(x, ids.astype(np.int64), weights), held.layout.down, steps=2)
