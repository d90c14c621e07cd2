"""The kernel of one token's attention against numpy in float64: norms, rope, the cache, and the sum over the context."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from moec.targets.kernels.cuda.arrival import SEMAPHORES
from moec.targets.kernels.cuda.attention_parts import PAGE
from moec.targets.kernels.cuda.step import step_func
from moec.targets.kernels.cuda.step_spec import StepOptions, StepSpec
from moec.targets.kernels.specs import AttentionSpec, NormSpec
from tests.targets.kernels.cuda.packed import MULTIPROCESSORS
from tests.targets.kernels.emulator import needs_emulator
from tests.targets.kernels.run_cuda import CudaKernel

pytestmark = needs_emulator

Array = NDArray[Any]
PAGES = 8  # of the longest context, and as many of another sequence
SMALL = StepOptions(warps=2, positions=4, stages=2, splits=5, least=8)


def row_norm(heads: int, d: int) -> NormSpec:
    return NormSpec(heads * d, 1, 1e-5)


def head_norm(heads: int, d: int, offset: float = 0.0) -> NormSpec:
    return NormSpec(d, heads, 1e-6, offset)


OLMOE = StepSpec(AttentionSpec(2, 2, 64, 64, 0.125), row_norm(2, 64), row_norm(2, 64), rope=True)
QWEN = StepSpec(AttentionSpec(16, 2, 128, 128, 0.09), head_norm(16, 128), head_norm(2, 128), rope=True)
ODD = StepSpec(AttentionSpec(5, 1, 17, 21, 0.3, window=37, softcap=3.0))
SINKS = StepSpec(AttentionSpec(6, 2, 20, 24, 0.3, chunk=40, sinks=True), rope=True)
MANY = StepSpec(AttentionSpec(20, 1, 32, 16, 0.2, window=70, sinks=True), None, head_norm(1, 32, 1.0), rope=True)
LATENT = StepSpec(AttentionSpec(2, 2, 192, 128, 0.07))


class Case:
    """A cache of `position` tokens on pages in random order, NaN where nothing is, and the next token."""

    def __init__(self, spec: StepSpec, position: int, dtype: str, seed: int = 0) -> None:
        rng, a = np.random.default_rng(seed), spec.attention
        self.spec, self.position, self.dtype = spec, position, dtype
        self.table = rng.permutation(2 * PAGES).reshape(2, PAGES).astype(np.int32)
        self.history = [rounded(rng.standard_normal((a.kv_heads, position, size)), dtype) for size in (a.d, a.dv)]
        self.pools = [np.full((2 * PAGES, a.kv_heads, PAGE, size), np.nan, np.float32) for size in (a.d, a.dv)]
        for pool, history in zip(self.pools, self.history, strict=True):
            for t in range(position):
                pool[self.table[1, t // PAGE], :, t % PAGE] = history[:, t]
        if dtype == "bfloat16":
            self.pools = [(pool.view(np.uint32) >> 16).astype(np.uint16) for pool in self.pools]
        widths = (a.heads * a.d, a.kv_heads * a.d, a.kv_heads * a.dv)
        self.q, self.k, self.v = (rng.standard_normal((1, width)).astype(np.float32) for width in widths)
        norms = [n for n in (spec.q_norm, spec.k_norm) if n is not None]
        self.weights = [(1 + 0.3 * rng.standard_normal(n.size)).astype(np.float32) for n in norms]
        angles = np.tile(rng.uniform(0, 6, a.d // 2), 2).astype(np.float32)[None]
        self.angles = [np.cos(angles) * np.float32(1.1), np.sin(angles) * np.float32(1.1)] if spec.rope else []
        self.sinks = [rng.standard_normal(a.heads).astype(np.float32)] if a.sinks else []
        self.semaphores = np.zeros(SEMAPHORES, np.int32)

    def run(self, kernel: CudaKernel, options: StepOptions) -> Array:
        """The result; the pools change."""
        a, blocks = self.spec.attention, np.array([[1, 0, 1, self.position]], np.int32)
        inputs = [*self.pools, self.q, self.k, self.v, blocks, self.table, self.semaphores, *self.weights, *self.angles, *self.sinks]
        shapes = [(options.splits, a.heads, a.dv), (options.splits, a.heads, 2), (1, a.heads * a.dv)]
        return kernel(*inputs, outputs=[(shape, "float32") for shape in shapes])[2]

    def _row(self, x: Array, norm: NormSpec | None, weights: list[Array]) -> Array:
        """Heads of q or k, normalised and turned."""
        d = self.spec.attention.d
        x = x.astype(np.float64)
        if norm is not None:
            groups = x.reshape(norm.groups, norm.size)
            weight = weights.pop(0) + norm.offset
            x = groups / np.sqrt((groups**2).mean(-1, keepdims=True) + norm.eps) * weight
        x = x.reshape(-1, d)
        if self.angles:
            cos, sin = self.angles
            x = x * cos + np.concatenate([-x[:, d // 2 :], x[:, : d // 2]], -1) * sin
        return x

    def expected(self) -> tuple[Array, Array, Array]:
        """The result, and the new key and value."""
        a, weights = self.spec.attention, list(self.weights)
        q, k = self._row(self.q, self.spec.q_norm, weights), self._row(self.k, self.spec.k_norm, weights)
        v = rounded(self.v.reshape(a.kv_heads, a.dv), self.dtype)
        rows = rounded(k, self.dtype)
        keys, values = (np.concatenate([h, x[:, None]], 1) for h, x in zip(self.history, (rows, v), strict=True))
        group = a.heads // a.kv_heads
        logits = np.einsum("hgd,htd->hgt", q.reshape(a.kv_heads, group, a.d), keys) * a.scale
        if a.softcap:
            logits = np.tanh(logits / a.softcap) * a.softcap
        positions = np.arange(self.position + 1)
        hidden = positions < (self.position + 1 - a.window if a.window else 0)
        hidden |= positions < (self.position // a.chunk * a.chunk if a.chunk else 0)
        logits = np.where(hidden, -np.inf, logits)
        if self.sinks:
            logits = np.concatenate([logits, self.sinks[0].reshape(a.kv_heads, group, 1)], -1)
        weight = np.exp(logits - logits.max(-1, keepdims=True))
        weight = (weight / weight.sum(-1, keepdims=True))[..., : self.position + 1]
        return np.einsum("hgt,htd->hgd", weight, values).reshape(1, -1), rows, v


def rounded(x: Array, dtype: str) -> Array:
    """Float32, or what bfloat16 keeps of it."""
    bits = x.astype(np.float32).view(np.uint32)
    if dtype == "bfloat16":
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return bits.view(np.float32)


def check(spec: StepSpec, options: StepOptions, positions: list[int], dtype: str = "float32", seed: int = 0) -> None:
    kernel = CudaKernel(step_func(spec, options, dtype))
    for position in positions:
        case = Case(spec, position, dtype, seed)
        before = [pool.copy() for pool in case.pools]
        found = case.run(kernel, options)
        result, *rows = case.expected()
        atol = 5e-6 if dtype == "float32" else 2e-3  # a key may be rounded the other way
        np.testing.assert_allclose(found, result, atol=atol, err_msg=f"position {position}")
        page, at = case.table[1, position // PAGE], position % PAGE
        for pool, old, row in zip(case.pools, before, rows, strict=True):
            new = pool[page, :, at] if dtype == "float32" else (pool[page, :, at].astype(np.uint32) << 16).view(np.float32)
            np.testing.assert_allclose(new, row, rtol=1e-5 if dtype == "float32" else 1e-2, atol=1e-5)
            old[page, :, at] = pool[page, :, at]
            np.testing.assert_array_equal(pool, old)  # nothing else changes
        assert not case.semaphores.any()


@pytest.mark.parametrize("name", ["OLMOE", "QWEN", "ODD", "SINKS", "MANY", "LATENT"])
def test_contexts_of_any_length(name: str) -> None:
    lengths = [0, 1, 7, 31, 32, 33, 63, 64, 100, 128, 200, PAGES * PAGE - 1]
    check(globals()[name], SMALL, lengths if name != "QWEN" else [0, 33, 200])


@pytest.mark.parametrize("name", ["QWEN", "ODD", "SINKS"])
def test_a_cache_in_bfloat16(name: str) -> None:
    check(globals()[name], replace(SMALL, stages=1), [0, 5, 200], "bfloat16")


@pytest.mark.parametrize("name", ["OLMOE", "MANY"])
def test_default_options(name: str) -> None:
    spec = globals()[name]
    check(spec, StepOptions.of(spec, "float32", 160 << 10, MULTIPROCESSORS), [3, 120, 255])


def test_parts_are_added_up_where_that_is_faster() -> None:
    """Heads that share keys and values take a short context in one part, and a longer one in parts of a turn of the warps each."""
    shared, alone = (StepOptions.of(spec, "float32", 160 << 10, MULTIPROCESSORS) for spec in (QWEN, OLMOE))
    assert (shared.alone, shared.least) == (128, shared.warps * shared.positions)
    assert (alone.alone, alone.least) == (0, 128)


def any_shape(data: st.DataObject) -> tuple[AttentionSpec, list[NormSpec | None], StepOptions]:
    """Attention of any shape, the norms of its queries and keys, and options."""
    kv_heads, group = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 2, 3, 4, 7, 8, 12, 17]))
    d, dv = 2 * data.draw(st.integers(2, 50)), data.draw(st.integers(3, 140))
    heads = kv_heads * group
    norms = [data.draw(st.sampled_from([None, head_norm(n, d), head_norm(n, d, 1.0), row_norm(n, d)])) for n in (heads, kv_heads)]
    attention = AttentionSpec(
        heads, kv_heads, d, dv, d**-0.5, data.draw(st.sampled_from([0, 0, 19, 64])), data.draw(st.sampled_from([0, 0, 48])),
        data.draw(st.sampled_from([0.0, 0.0, 5.0])), data.draw(st.booleans()),
    )  # fmt: skip
    options = StepOptions(
        data.draw(st.sampled_from([2, 4, 8])), data.draw(st.sampled_from([4, 8])), data.draw(st.integers(1, 3)),
        data.draw(st.sampled_from([1, 3, 12])), data.draw(st.sampled_from([8, 32, 64])), alone=data.draw(st.sampled_from([0, 128])),
    )  # fmt: skip
    return attention, norms, options


@settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    attention, norms, options = any_shape(data)
    positions = data.draw(st.lists(st.integers(0, PAGES * PAGE - 1), min_size=4, max_size=4))
    check(StepSpec(attention, norms[0], norms[1], data.draw(st.booleans())), options, positions, seed=data.draw(st.integers(0, 99)))
