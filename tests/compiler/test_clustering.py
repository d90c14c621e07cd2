"""Clustering and assignment, against trying everything."""

from __future__ import annotations

from itertools import permutations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.compiler.clustering import assign, average_linkage


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 6), seed=st.integers(0, 9999), whole=st.booleans())
def test_assignment_is_the_best_of_all(size: int, seed: int, whole: bool) -> None:
    gain = np.random.default_rng(seed).normal(size=(size, size))
    gain = gain.round() if whole else gain  # whole numbers have ties
    found = assign(gain)
    assert sorted(found.tolist()) == list(range(size))
    best = max(sum(gain[row, columns[row]] for row in range(size)) for columns in permutations(range(size)))
    assert abs(gain[np.arange(size), found].sum() - best) < 1e-9


@settings(max_examples=20, deadline=None)
@given(size=st.integers(2, 9), seed=st.integers(0, 9999), data=st.data())
def test_each_join_is_of_the_nearest_clusters(size: int, seed: int, data: st.DataObject) -> None:
    points = np.random.default_rng(seed).normal(size=(size, 3))
    distance = np.linalg.norm(points[:, None] - points, axis=-1)
    count = data.draw(st.integers(1, size - 1))
    before, after = average_linkage(distance, count + 1), average_linkage(distance, count)
    assert sorted(e for group in after for e in group) == list(range(size))
    joined = [group for group in before if group not in after]
    means = {(a, b): distance[np.ix_(before[a], before[b])].mean() for a in range(count + 1) for b in range(a)}
    a, b = min(means, key=lambda pair: means[pair])
    assert sorted(joined) == sorted([before[a], before[b]])
