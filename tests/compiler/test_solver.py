"""The integer program against enumeration, and what must hold of any optimum."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.compiler.solver import AtLeast, choose
from moec.runtime.errors import MoecError


def enumerated(damage: np.ndarray, size: np.ndarray, budget: int, conditions: list[AtLeast]) -> float:
    """The least damage by trying everything; infinite if nothing fits."""
    rows, best = np.arange(len(damage)), np.inf
    for options in product(range(damage.shape[1]), repeat=len(damage)):
        if size[rows, list(options)].sum() > budget:
            continue
        if all(sum((u, o) in c.pairs for u, o in enumerate(options)) >= c.count for c in conditions):
            best = min(best, float(damage[rows, list(options)].sum()))
    return best


@settings(max_examples=25, deadline=None)
@given(units=st.integers(1, 6), options=st.integers(1, 4), seed=st.integers(0, 9999), tight=st.floats(0, 1), conditioned=st.booleans())
def test_as_good_as_trying_everything(units: int, options: int, seed: int, tight: float, conditioned: bool) -> None:
    rng = np.random.default_rng(seed)
    damage, size = rng.lognormal(0, 3, (units, options)), rng.integers(1, 40, (units, options)) * 96
    budget = int(size.min(1).sum() + tight * (size.max(1).sum() - size.min(1).sum()))
    conditions = [AtLeast(tuple((u, options - 1) for u in range(units)))] if conditioned else []
    expected = enumerated(damage, size, budget, conditions)
    if np.isinf(expected):
        with pytest.raises(MoecError, match="side conditions"):
            choose(damage, size, budget, conditions)
        return
    found = choose(damage, size, budget, conditions)
    assert found.damage == pytest.approx(expected, rel=1e-6, abs=1e-6 * damage.max())
    assert found.size == size[np.arange(units), list(found.options)].sum() <= budget
    assert found.gap < 1e-6


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 9999), tight=st.floats(0, 1))
def test_options_that_a_unit_does_not_have_are_not_chosen(seed: int, tight: float) -> None:
    rng = np.random.default_rng(seed)
    damage, size = rng.lognormal(0, 3, (5, 4)), rng.integers(1, 40, (5, 4)) * 96
    allowed = rng.random((5, 4)) < 0.6
    allowed[np.arange(5), rng.integers(0, 4, 5)] = True
    low, high = (np.where(allowed, size, end).min(1).sum() if end else np.where(allowed, size, 0).max(1).sum() for end in (1 << 40, 0))
    budget = int(low + tight * (high - low))
    expected = enumerated(np.where(allowed, damage, 1e30), np.where(allowed, size, 1 << 40), budget, [])
    found = choose(np.where(allowed, damage, np.nan), np.where(allowed, size, -1), budget, (), allowed)
    assert all(allowed[u, o] for u, o in enumerate(found.options))
    assert found.damage == pytest.approx(expected, rel=1e-6, abs=1e-6 * damage.max())
    assert found.size <= budget


def test_a_larger_budget_is_never_worse() -> None:
    rng = np.random.default_rng(0)
    size = np.tile([2, 3, 4], (200, 1)) * rng.integers(1, 4, (200, 1))
    damage = rng.lognormal(size=(200, 1)) * np.array([1.0, 0.25, 0.06])
    found = [choose(damage, size, int(size[:, 0].sum() * share)).damage for share in (1.0, 1.1, 1.2, 1.5, 1.9, 2.0)]
    assert found == sorted(found, reverse=True)
    assert found[-1] == pytest.approx(damage[:, 2].sum())
    assert found[0] == pytest.approx(damage[:, 0].sum())


def test_errors_say_what_is_needed() -> None:
    with pytest.raises(MoecError, match="budget of 5 is below the smallest size possible, 6"):
        choose([[1, 0]] * 3, [[2, 3]] * 3, 5)
    with pytest.raises(MoecError, match="not all finite"):
        choose([[np.nan]], [[1]], 5)
