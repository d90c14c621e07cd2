"""The slots of many tokens sorted by expert, their tiles, and what is counted of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.targets.kernels.cuda.sort import most_tiles, sort_func
from tests.targets.kernels.emulator import needs_emulator
from tests.targets.kernels.run_cuda import CudaKernel

pytestmark = needs_emulator


@pytest.fixture(scope="module")
def sort() -> CudaKernel:
    return CudaKernel(sort_func(5, 3, "int64", 4, counted=True))


@settings(max_examples=10, deadline=None)
@given(tokens=st.integers(1, 400), seed=st.integers(0, 1000))
def test_sort(sort: CudaKernel, tokens: int, seed: int) -> None:
    ids = np.random.default_rng(seed).integers(-1, 7, (tokens, 3))
    counts, slots = np.arange(8), 3 * tokens
    most = most_tiles(slots, 5, 4)
    order, places, tiles = sort(ids, counts, outputs=[((slots,), "int32"), ((slots,), "int32"), ((most + 1, 4), "int32")])
    flat = ids.ravel()
    kept = np.flatnonzero((flat >= 0) & (flat < 5))
    expected = kept[np.argsort(flat[kept], kind="stable")]
    np.testing.assert_array_equal(order[: len(kept)], expected)
    np.testing.assert_array_equal(places[expected], np.arange(len(kept)))
    assert (np.delete(places, kept) == -1).all()
    covered = [flat[order[first : first + size]] for _, first, size, _ in tiles[: tiles[most, 0]]]
    assert [set(found) for found in covered] == [{e} for e, *_ in tiles[: tiles[most, 0]]]
    assert sum(map(len, covered)) == len(kept)
    np.testing.assert_array_equal(counts, [tokens, 1 + len(kept), 2, 3, 4, 5, 6, 7])
