"""The attention kernel against `moec.compiler.ops_attention.attention` in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from moec.compiler import ops_attention
from moec.targets.kernels.cpu.attention import PAGE
from moec.targets.kernels.specs import AttentionSpec
from tests.targets.kernels.hardware import KINDS, Hardware, hardware
from tests.targets.kernels.run import Kernel

SPECS = [
    AttentionSpec(4, 2, 48, 48, 0.2),
    AttentionSpec(6, 3, 64, 64, 0.125, window=20, sinks=True),
    AttentionSpec(6, 2, 20, 24, 0.3, chunk=40, softcap=3.0, sinks=True),
    AttentionSpec(5, 1, 17, 21, 0.3, window=7, softcap=3.0),
    AttentionSpec(2, 2, 192, 128, 0.07),  # the head sizes of multi-head latent attention
]
ATOL = {"cpu": 5e-6, "cuda": 3e-5}  # on the tensor cores, numbers have 16 bits
CHOSEN = {"cpu": range(len(SPECS)), "cuda": (1, 2)}  # compiling for the emulated GPU takes seconds each
MAX_PAGES = 6


class Cache:
    """Pages in a random order, filled with NaN, which no result may show."""

    def __init__(self, kind: Hardware, spec: AttentionSpec, sequences: int, rng: np.random.Generator) -> None:
        pages = sequences * MAX_PAGES
        self.pools = [Kernel.aligned(np.full((pages, *shape), np.nan, np.float32)) for shape in kind.page_shapes(spec)]
        self.pools[1][..., spec.dv :] = 0  # the executor hands out zeros, and padding is never written
        self.table = rng.permutation(pages).reshape(sequences, MAX_PAGES).astype(np.int32)


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_of_sequences_in_any_order(kind: str) -> None:
    @settings(max_examples=30 if kind == "cpu" else 6, deadline=None)  # the emulated GPU takes its time
    @given(data=st.data(), seed=st.integers(0, 1000))
    def check(data: st.DataObject, seed: int) -> None:
        spec, rng = SPECS[data.draw(st.sampled_from(CHOSEN[kind]))], np.random.default_rng(seed)
        lengths = data.draw(st.lists(st.integers(1, 5 * PAGE), min_size=1, max_size=3))
        sequences = [random_sequence(spec, n, rng) for n in lengths]
        sinks = rng.standard_normal(spec.heads).astype(np.float32)
        run = hardware(kind).attention(spec, None)
        cache, done = Cache(hardware(kind), spec, len(lengths), rng), [0] * len(lengths)
        found: list[list[NDArray[np.float32]]] = [[] for _ in lengths]
        while any(d < n for d, n in zip(done, lengths, strict=True)):
            parts = list[tuple[int, int, int]]()
            for i, n in enumerate(lengths):
                size = data.draw(st.integers(0 if parts or i + 1 < len(lengths) else min(1, n - done[i]), n - done[i]))
                parts += [(i, done[i], done[i] + size)] if size else []
            if not parts:
                continue
            for (i, begin, end), piece in zip(parts, attend(run, spec, cache, sequences, parts, sinks), strict=True):
                found[i].append(piece)
                done[i] = end
                assert begin < end
        for sequence, pieces in zip(sequences, found, strict=True):
            np.testing.assert_allclose(np.concatenate(pieces), expected(spec, sequence, sinks), atol=ATOL[kind])

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_one_token_at_a_time(kind: str) -> None:
    for index in CHOSEN[kind]:
        spec, rng = SPECS[index], np.random.default_rng(index)
        sequence, cache = random_sequence(spec, 70, rng), Cache(hardware(kind), spec, 1, rng)
        sinks = rng.standard_normal(spec.heads).astype(np.float32)
        found = [attend(hardware(kind).attention(spec, 1), spec, cache, [sequence], [(0, t, t + 1)], sinks)[0] for t in range(70)]
        np.testing.assert_allclose(np.concatenate(found), expected(spec, sequence, sinks), atol=5e-6)


def random_sequence(spec: AttentionSpec, length: int, rng: np.random.Generator) -> list[NDArray[np.float32]]:
    """q [T, H, d], k [T, HK, d], v [T, HK, dv]."""
    shapes = ((spec.heads, spec.d), (spec.kv_heads, spec.d), (spec.kv_heads, spec.dv))
    return [rng.standard_normal((length, *shape)).astype(np.float32) for shape in shapes]


def attend(
    run: Callable[..., list[NDArray[Any]]],
    spec: AttentionSpec,
    cache: Cache,
    sequences: list[list[NDArray[np.float32]]],
    parts: list[tuple[int, int, int]],
    sinks: NDArray[np.float32],
) -> list[NDArray[np.float32]]:
    """One call for the tokens begin to end of some sequences: the results of each part [T, H*dv]."""
    tensors = [np.concatenate([sequences[i][j][a:b].reshape(b - a, -1) for i, a, b in parts]) for j in range(3)]
    blocks, first = [], 0
    for i, begin, end in parts:
        for at in range(begin, end, 16):
            blocks.append((i, first, min(16, end - at), at))
            first += min(16, end - at)
    inputs = [*cache.pools, *tensors, np.array(blocks, np.int32), cache.table, *([sinks] if spec.sinks else [])]
    (out,) = run(*inputs, outputs=[((first, spec.heads * spec.dv), "float32")])
    return np.split(out, np.cumsum([b - a for _, a, b in parts])[:-1])


def expected(spec: AttentionSpec, sequence: list[NDArray[np.float32]], sinks: NDArray[np.float32]) -> NDArray[np.float64]:
    q, k, v = (torch.from_numpy(x).double()[None] for x in sequence)
    logits = torch.from_numpy(sinks).double() if spec.sinks else None
    found = ops_attention.attention(q, k, v, logits, scale=spec.scale, window=spec.window, chunk=spec.chunk, softcap=spec.softcap)
    result: NDArray[np.float64] = found[0].reshape(len(sequence[0]), -1).numpy()
    return result
