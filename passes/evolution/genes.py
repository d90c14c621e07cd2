"""A candidate of the search, and how new ones come of old ones: mutation and crossover of two matrices a group of layers.

The rates are those of the released search configuration of https://arxiv.org/abs/2407.00945.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float32]
"""[E', E]: new experts, or their scores, as sums of old ones."""


@dataclass(frozen=True)
class Rates:
    """How often what changes.

    Args:
        row: a row of a one-hot matrix becomes another expert.
        crossover: a child comes of two parents instead of one (when matrices are no longer one-hot).
        first: what crossover takes comes from the first parent.
        group: a matrix is changed at all.
        element, deviation: an element changes, by a normal number of this deviation.
        renormalize: the rows of a merging matrix are scaled to sum to 1.
        mutation_points, crossover_points: parents are those that are worth so much less than the best at most.
    """

    row: float = 0.15
    crossover: float = 0.3
    first: float = 0.6
    group: float = 0.25
    element: float = 0.25
    deviation: float = 0.065
    renormalize: float = 0.1
    mutation_points: float = 3.0
    crossover_points: float = 1.0


@dataclass(frozen=True, eq=False)
class Candidate:
    """One point of the search: for each group of layers a merging and a routing matrix, and what it is worth (more is better)."""

    merge: tuple[Matrix, ...]
    route: tuple[Matrix, ...]
    fitness: float = -np.inf

    @property
    def one_hot(self) -> bool:
        """Whether every new expert is an old one."""
        pairs = zip(self.merge, self.route, strict=True)
        return all(np.array_equal(m, r) and bool(((m == 0) | (m == 1)).all()) and bool((m.sum(1) == 1).all()) for m, r in pairs)


def one_hot(experts: Sequence[int], count: int) -> Matrix:
    """The rows of the identity [E, E] at some experts."""
    return np.eye(count, dtype=np.float32)[list(experts)]


def random_candidate(sizes: Sequence[tuple[int, int]], rng: np.random.Generator) -> Candidate:
    """Distinct experts at random, for groups of (E', E)."""
    rows = tuple(one_hot(rng.permutation(count)[:keep].tolist(), count) for keep, count in sizes)
    return Candidate(rows, rows)


def mutate_one_hot(parent: Candidate, rates: Rates, rng: np.random.Generator) -> Candidate:
    """Some rows become experts that no other row is; at least one does, if any can."""
    groups = [row.argmax(1).tolist() for row in parent.merge]
    counts = [row.shape[1] for row in parent.merge]
    free = [g for g, experts in enumerate(groups) if len(experts) < counts[g]]
    if not free:
        return parent
    chosen = [(g, at) for g in free for at in range(len(groups[g])) if rng.random() < rates.row]
    if not chosen:
        g = free[rng.integers(len(free))]
        chosen = [(g, int(rng.integers(len(groups[g]))))]
    for g, at in chosen:
        others = sorted(set(range(counts[g])) - set(groups[g]))
        groups[g][at] = others[rng.integers(len(others))]
    rows = tuple(one_hot(experts, count) for experts, count in zip(groups, counts, strict=True))
    return Candidate(rows, rows)


def mutate(parent: Candidate, rates: Rates, rng: np.random.Generator) -> Candidate:
    """Noise on some elements of some matrices (at least one)."""
    matrices = [m.copy() for m in (*parent.merge, *parent.route)]
    for at in _some(len(matrices), rates.group, rng):
        noise = rng.normal(0, rates.deviation, matrices[at].shape) * (rng.random(matrices[at].shape) < rates.element)
        matrices[at] = (matrices[at] + noise).astype(np.float32)
    for matrix in matrices[: len(parent.merge)]:
        for row in matrix:
            if rng.random() < rates.renormalize and abs(total := float(row.sum())) > 1e-3:
                row /= total
    half = len(parent.merge)
    return Candidate(tuple(matrices[:half]), tuple(matrices[half:]))


def cross(first: Candidate, second: Candidate, rates: Rates, rng: np.random.Generator) -> Candidate:
    """Some matrices mix the rows of two parents; each other one is one parent's."""
    mine, theirs = (*first.merge, *first.route), (*second.merge, *second.route)
    mixed = set(_some(len(mine), rates.group, rng))
    matrices = []
    for at, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        rows = rng.random((len(a), 1)) < rates.first
        matrices.append(np.where(rows, a, b) if at in mixed else a if rng.random() < rates.first else b)
    half = len(first.merge)
    return Candidate(tuple(matrices[:half]), tuple(matrices[half:]))


def _some(count: int, rate: float, rng: np.random.Generator) -> list[int]:
    """Which of `count` are selected: each with this probability, drawn again until one is."""
    while not (chosen := np.flatnonzero(rng.random(count) < rate).tolist()):
        pass
    return list(map(int, chosen))
