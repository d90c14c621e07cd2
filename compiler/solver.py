"""Choosing one option for each of many units under a budget: the multiple-choice knapsack problem, as an integer program.

    minimise    sum over u, o of damage[u][o] x[u, o]           x[u, o] in {0, 1}
    subject to  sum over o of x[u, o] = 1                       for each unit u
                sum over u, o of size[u][o] x[u, o] <= budget
                sum over (u, o) in S of x[u, o] >= n            for each side condition (S, n)

Solved by HiGHS (https://highs.dev, through `scipy.optimize.milp`) to a relative gap of 1e-9. Sizes are integers and the budget is kept
exactly: the chosen options are added up again afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moec.compiler.errors import MoecError

GAP = 1e-9
"""The largest relative distance of a solution from the best possible one that counts as optimal."""

TIME_LIMIT_S = 300.0
"""After so long the best solution found is taken; `Solution.gap` says how far from the best it may be."""


@dataclass(frozen=True)
class AtLeast:
    """A side condition: at least `count` of these (unit, option) pairs are chosen."""

    pairs: tuple[tuple[int, int], ...]
    count: int = 1


@dataclass(frozen=True)
class Solution:
    """What was chosen: the option of each unit, the sum of its damages and sizes, and the proven relative gap to the optimum."""

    options: tuple[int, ...]
    damage: float
    size: int
    gap: float


def choose(
    damage: ArrayLike, size: ArrayLike, budget: int, conditions: Sequence[AtLeast] = (), allowed: ArrayLike | None = None
) -> Solution:
    """The options of least damage within a budget.

    Args:
        damage: [U, O] float, finite; what option o does to unit u. Damages add up.
        size: [U, O] integers, in any unit (bits, bytes).
        budget: the most that the sizes may add up to.
        conditions: what else must hold.
        allowed: [U, O] bool, the options that each unit has, one at least; all unless given. Other damages and sizes are not read.

    Raises:
        MoecError: no choice fits the budget; the message says what the smallest needs.

    >>> choose([[9, 1], [5, 2]], [[1, 2], [1, 2]], 3).options
    (1, 0)
    """
    cost, weight = np.asarray(damage, np.float64), np.asarray(size, np.int64)
    assert cost.shape == weight.shape and cost.ndim == 2
    given = np.ones(cost.shape, bool) if allowed is None else np.asarray(allowed, bool)
    if cost.size:  # what a unit must not have costs as much as the worst that it may, so that it decides no scale
        cost = np.where(given, cost, np.where(given, cost, -np.inf).max(1, keepdims=True))
        weight = np.where(given, weight, np.where(given, weight, 0).max(1, keepdims=True))
    if not np.isfinite(cost).all():
        raise MoecError("the damages of the options are not all finite: the model's outputs on the calibration text are not, either")
    if not cost.size:
        return Solution((), 0.0, 0, 0.0)
    least = int(weight.min(1).sum())
    if least > budget:
        raise MoecError(f"the budget of {budget:,} is below the smallest size possible, {least:,}: raise it or offer smaller formats")
    picked, gap = _solve(cost, weight, budget, conditions, given)
    rows = np.arange(len(cost))
    total = int(weight[rows, picked].sum())
    assert total <= budget
    return Solution(tuple(picked.tolist()), float(cost[rows, picked].sum()), total, gap)


def _solve(
    cost: NDArray[np.float64], size: NDArray[np.int64], budget: int, conditions: Sequence[AtLeast], given: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], float]:
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    units, options = cost.shape
    # What every choice needs is taken off, and the rest is counted in its greatest common divisor: small numbers are exact in HiGHS.
    extra = size - size.min(1, keepdims=True)
    step = int(np.gcd.reduce(extra, axis=None)) or 1
    room = (budget - int(size.min(1).sum())) // step
    relative = cost - cost.min(1, keepdims=True)
    relative /= max(float(relative.max()), math.ulp(0.0))
    at = np.arange(units * options)
    constraints = [
        LinearConstraint(csr_array((np.ones(len(at)), (at // options, at)), shape=(units, len(at))), 1, 1),
        LinearConstraint(csr_array((extra // step).reshape(1, -1).astype(np.float64)), -np.inf, room),
    ]
    for condition in conditions:
        row = np.zeros((1, len(at)))
        row[0, [unit * options + option for unit, option in condition.pairs]] = 1
        constraints.append(LinearConstraint(csr_array(row), condition.count, np.inf))
    found = milp(
        relative.ravel(), integrality=np.ones(len(at)), bounds=Bounds(0, given.ravel().astype(np.float64)), constraints=constraints,
        options={"mip_rel_gap": GAP, "time_limit": TIME_LIMIT_S},
    )  # fmt: skip
    if found.x is None:
        raise MoecError(
            f"no choice fits the budget of {budget:,} and the {len(conditions)} side conditions: raise it or drop the conditions"
            if found.status == 2
            else f"the integer program over {units} units was not solved: {found.message}"
        )
    return found.x.reshape(units, options).argmax(1), float(found.mip_gap or 0.0)
