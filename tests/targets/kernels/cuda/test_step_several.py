"""Attention of several tokens in one kernel against numpy in float64: batches of sequences, short prompts, and calls that are filled up."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from moec.targets.kernels.cuda.arrival import SEMAPHORES
from moec.targets.kernels.cuda.attend_product import together
from moec.targets.kernels.cuda.attention_parts import PAGE
from moec.targets.kernels.cuda.step import outputs, step_func
from moec.targets.kernels.cuda.step_spec import StepOptions, StepSpec
from moec.targets.kernels.specs import AttentionSpec, NormSpec
from tests.targets.kernels.cuda.packed import MULTIPROCESSORS
from tests.targets.kernels.cuda.test_step import MANY, ODD, OLMOE, QWEN, SINKS, any_shape, rounded, row_norm
from tests.targets.kernels.emulator import needs_emulator
from tests.targets.kernels.run_cuda import CudaKernel

pytestmark = needs_emulator

Array = NDArray[Any]
PAGES = 6  # of the longest context
BLOCK = 16  # tokens of a block
SMALL = StepOptions(warps=2, positions=4, stages=2, splits=3, least=8)
SPECS = {"OLMOE": OLMOE, "QWEN": QWEN, "ODD": ODD, "SINKS": SINKS, "MANY": MANY}


@dataclass(frozen=True)
class Part:
    """The next `tokens` of a sequence that has `before`; `fills` of the last part repeat its last token, each as a block of its own."""

    before: int
    tokens: int
    fills: int = 0


class Call:
    """Some sequences on pages in random order, NaN where nothing is, and their next tokens in one call."""

    def __init__(self, spec: StepSpec, parts: list[Part], dtype: str, seed: int = 0) -> None:
        rng, a = np.random.default_rng(seed), spec.attention
        self.spec, self.parts, self.dtype = spec, parts, dtype
        self.table = rng.permutation((len(parts) + 1) * PAGES).reshape(-1, PAGES).astype(np.int32)
        self.pools = [np.full((self.table.size, a.kv_heads, PAGE, size), np.nan, np.float32) for size in (a.d, a.dv)]
        self.history = [[rounded(rng.standard_normal((p.before, a.kv_heads, n)), dtype) for n in (a.d, a.dv)] for p in parts]
        for i, rows in enumerate(self.history):
            for pool, old in zip(self.pools, rows, strict=True):
                for t, row in enumerate(old):
                    pool[self.table[i + 1, t // PAGE], :, t % PAGE] = row
        if dtype == "bfloat16":
            self.pools = [(pool.view(np.uint32) >> 16).astype(np.uint16) for pool in self.pools]
        blocks, self.positions, self.owner = list[tuple[int, int, int, int]](), list[int](), list[int]()
        for i, p in enumerate(parts):
            first = len(self.positions)
            blocks += [(i + 1, first + n, min(BLOCK, p.tokens - n), p.before + n) for n in range(0, p.tokens, BLOCK)]
            self.positions += range(p.before, p.before + p.tokens)
            blocks += [(i + 1, first + p.tokens + n, 1, p.before + p.tokens - 1) for n in range(p.fills)]
            self.positions += [p.before + p.tokens - 1] * p.fills
            self.owner += [i] * (p.tokens + p.fills)
        self.blocks, self.count = np.array(blocks, np.int32), len(self.positions)
        widths = (a.heads * a.d, a.kv_heads * a.d, a.kv_heads * a.dv)
        angles = np.tile(rng.uniform(0, 6, (self.count, a.d // 2)), 2).astype(np.float32)
        tensors = [rng.standard_normal((self.count, width)).astype(np.float32) for width in widths]
        for x in (*tensors, angles):
            for t in range(1, self.count):  # a repeated token is the same in all it has
                if self.owner[t] == self.owner[t - 1] and self.positions[t] == self.positions[t - 1]:
                    x[t] = x[t - 1]
        self.q, self.k, self.v = tensors
        norms = [n for n in (spec.q_norm, spec.k_norm) if n is not None]
        self.weights = [(1 + 0.3 * rng.standard_normal(n.size)).astype(np.float32) for n in norms]
        self.angles = [np.cos(angles) * np.float32(1.1), np.sin(angles) * np.float32(1.1)] if spec.rope else []
        self.sinks = [rng.standard_normal(a.heads).astype(np.float32)] if a.sinks else []
        self.semaphores = np.zeros(SEMAPHORES, np.int32)

    def run(self, kernel: CudaKernel, options: StepOptions) -> list[Array]:
        """The result, and q for another kernel if there is one; the pools change."""
        inputs = [*self.pools, self.q, self.k, self.v, self.blocks, self.table, self.semaphores, *self.weights, *self.angles, *self.sinks]
        return kernel(*inputs, outputs=[(shape, "float32") for shape in outputs(self.spec, options, self.count)])[2:]

    def _rows(self, x: Array, norm: NormSpec | None, weights: list[Array]) -> Array:
        """Heads [T, heads, d] of q or k, normalised and turned."""
        d = self.spec.attention.d
        x = x.astype(np.float64)
        if norm is not None:
            groups = x.reshape(self.count, norm.groups, norm.size)
            x = groups / np.sqrt((groups**2).mean(-1, keepdims=True) + norm.eps) * (weights.pop(0) + norm.offset)
        x = x.reshape(self.count, -1, d)
        if self.angles:
            cos, sin = (angle[:, None] for angle in self.angles)
            x = x * cos + np.concatenate([-x[..., d // 2 :], x[..., : d // 2]], -1) * sin
        return x

    def expected(self) -> tuple[Array, Array, list[Array]]:
        """The results [T, H*dv], q [T, H*d], and the new keys and values."""
        a, weights = self.spec.attention, list(self.weights)
        q, k = self._rows(self.q, self.spec.q_norm, weights), self._rows(self.k, self.spec.k_norm, weights)
        news = [rounded(k, self.dtype), rounded(self.v.reshape(self.count, a.kv_heads, a.dv), self.dtype)]
        found = [self._attend(q[t], t, news) for t in range(self.count)]
        return np.stack(found), q.reshape(self.count, -1), news

    def _attend(self, q: Array, t: int, news: list[Array]) -> Array:
        a, own, position = self.spec.attention, self.owner[t], self.positions[t]
        begin, before = self.owner.index(own), self.parts[own].before
        new = slice(begin, begin + position + 1 - before)
        keys, values = (np.concatenate([h, n[new]]) for h, n in zip(self.history[own], news, strict=True))
        group = a.heads // a.kv_heads
        logits = np.einsum("hgd,thd->hgt", q.reshape(a.kv_heads, group, a.d), keys) * a.scale
        if a.softcap:
            logits = np.tanh(logits / a.softcap) * a.softcap
        seen = np.arange(position + 1)
        hidden = (seen <= position - a.window if a.window else False) | (seen < position // a.chunk * a.chunk if a.chunk else False)
        logits = np.where(hidden, -np.inf, logits)
        if self.sinks:
            logits = np.concatenate([logits, self.sinks[0].reshape(a.kv_heads, group, 1)], -1)
        weight = np.exp(logits - logits.max(-1, keepdims=True))
        weight = (weight / weight.sum(-1, keepdims=True))[..., : position + 1]
        return np.asarray(np.einsum("hgt,thd->hgd", weight, values).reshape(-1))

    def left(self) -> Array:
        """Of each token, whether another kernel attends for it: blocks of several tokens, and those that share a thread block."""
        found, size = np.zeros(self.count, bool), together(self.spec.attention)
        for i, (_, first, tokens, _) in enumerate(self.blocks):
            group = self.blocks[i // size * size :][:size]
            goes_on = [x[0] == y[0] and y[3] == x[3] + x[2] for x, y in pairwise(group)]
            found[first : first + tokens] = tokens > 1 or bool(goes_on and all(goes_on))
        return found


def check(spec: StepSpec, options: StepOptions, calls: list[list[Part]], dtype: str = "float32", seed: int = 0) -> None:
    """Calls of as many tokens as the kernel takes."""
    kernel = CudaKernel(step_func(spec, options, dtype))
    for parts in calls:
        call = Call(spec, parts, dtype, seed)
        before = [pool.copy() for pool in call.pools]
        found, *ready = call.run(kernel, options)
        result, q, news = call.expected()
        left = call.left() if spec.tokens is None else np.zeros(call.count, bool)
        atol = 5e-6 if dtype == "float32" else 2e-3  # a key may be rounded the other way
        np.testing.assert_allclose(found[~left], result[~left], atol=atol, err_msg=f"{parts}")
        if ready:
            np.testing.assert_allclose(ready[0][left], q[left], atol=1e-5, err_msg=f"{parts}")
        for pool, old, rows in zip(call.pools, before, news, strict=True):
            for own, position, row in zip(call.owner, call.positions, rows, strict=True):
                where = call.table[own + 1, position // PAGE], slice(None), position % PAGE
                new = pool[where] if dtype == "float32" else (pool[where].astype(np.uint32) << 16).view(np.float32)
                np.testing.assert_allclose(new, row, rtol=1e-5 if dtype == "float32" else 1e-2, atol=1e-5)
                old[where] = pool[where]
            np.testing.assert_array_equal(pool, old)  # nothing else changes
        assert not call.semaphores.any()


FOUR = [
    [Part(0, 1), Part(40, 1), Part(33, 1), Part(100, 1)],  # a batch
    [Part(0, 4)],  # a prompt
    [Part(31, 3, 1)],  # and one that is filled up
    [Part(64, 1), Part(30, 2, 1)],
    [Part(7, 2), Part(0, 2)],
    [Part(150, 1, 3)],
    [Part(38, 4)],  # begins a chunk
]


@pytest.mark.parametrize("name", ["OLMOE", "QWEN", "ODD", "SINKS", "MANY"])
def test_so_many_tokens(name: str) -> None:
    check(replace(SPECS[name], tokens=4), SMALL, FOUR if name not in ("QWEN", "MANY") else FOUR[:4])


def test_windows_shorter_than_a_prompt() -> None:
    check(replace(ODD, attention=replace(ODD.attention, window=2), tokens=4), SMALL, [[Part(30, 4)], [Part(0, 3), Part(9, 1)]])


@pytest.mark.parametrize("name", ["OLMOE", "SINKS"])
def test_a_cache_in_bfloat16(name: str) -> None:
    check(replace(SPECS[name], tokens=4), replace(SMALL, stages=1, splits=1), FOUR[:5], "bfloat16")


def test_keys_of_long_rows() -> None:
    """A warp reads them in turns."""
    spec = StepSpec(AttentionSpec(20, 10, 64, 32, 0.125), row_norm(20, 64), row_norm(10, 64), rope=True, tokens=2)
    check(spec, SMALL, [[Part(20, 2)], [Part(0, 1), Part(5, 1)]])


@pytest.mark.parametrize("name", ["OLMOE", "QWEN"])
def test_default_options(name: str) -> None:
    spec = replace(SPECS[name], tokens=8)
    options = StepOptions.of(spec, "float32", 160 << 10, MULTIPROCESSORS)
    check(spec, options, [[Part(n, 1) for n in (0, 10, 40, 180, 63, 64, 65)] + [Part(3, 1)], [Part(12, 5, 3)]])


ANY = [
    [Part(20 * (i % 8), 1) for i in range(9)],
    [Part(0, 20), Part(40, 1), Part(8, 17), Part(0, 2), Part(5, 1)],
    [Part(5, 1), Part(1, 33), Part(9, 1)],
    [Part(1, 33)],  # the last token's block shares a thread block with those before
]


@pytest.mark.parametrize("name", ["OLMOE", "SINKS", "MANY"])
def test_any_number_of_tokens(name: str) -> None:
    check(replace(SPECS[name], tokens=None), replace(SMALL, all_parts=27 if name == "OLMOE" else 5), ANY)


def test_options_for_many_tokens_let_thread_blocks_share_a_multiprocessor() -> None:
    spec = StepSpec(AttentionSpec(16, 16, 128, 128, 0.09), tokens=None)
    options = StepOptions.of(spec, "float32", 160 << 10, MULTIPROCESSORS, 48)
    assert options.together * 4 * options.words(spec, "float32") <= 160 << 10
    assert (options.together, options.warps) == (4, 4)
    assert options.splits == 1  # 9 tokens of 16 heads are more than there are multiprocessors
    few = StepOptions.of(replace(spec, tokens=4), "float32", 160 << 10, MULTIPROCESSORS)
    assert few.splits == 2
    one = StepOptions.of(replace(spec, tokens=1), "float32", 160 << 10, MULTIPROCESSORS)
    assert one.splits == 8


@settings(max_examples=3, deadline=None)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    attention, norms, options = any_shape(data)
    tokens = data.draw(st.sampled_from([2, 4, 8]))
    calls = list[list[Part]]()
    for _ in range(3):
        room, parts = tokens, list[Part]()
        while room:
            count = data.draw(st.integers(1, room))
            room -= count
            fills = room if data.draw(st.booleans()) else 0
            room -= fills
            parts.append(Part(data.draw(st.integers(0, PAGES * PAGE - count)), count, fills))
        calls.append(parts)
    spec = StepSpec(attention, norms[0], norms[1], data.draw(st.booleans()), tokens)
    check(spec, options, calls, seed=data.draw(st.integers(0, 99)))
