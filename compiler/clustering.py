"""Small combinatorial pieces that merging experts needs: agglomerative clustering, and the assignment problem."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def average_linkage(distance: NDArray[np.float64], clusters: int) -> list[list[int]]:
    """Agglomerative clustering: the two clusters with the least mean distance of their members are joined until so many are left.

    Args:
        distance: [E, E], symmetric.

    Returns:
        The members of each cluster in order, clusters by their first member.

    >>> average_linkage(np.abs(np.subtract.outer([0.0, 5.0, 0.1, 5.2], [0.0, 5.0, 0.1, 5.2])), 2)
    [[0, 2], [1, 3]]
    """
    groups = [[i] for i in range(len(distance))]
    between = distance.astype(np.float64).copy()
    np.fill_diagonal(between, np.inf)
    while len(groups) > clusters:
        a, b = sorted(np.unravel_index(int(between.argmin()), between.shape))
        na, nb = len(groups[a]), len(groups[b])
        joined = (na * between[a] + nb * between[b]) / (na + nb)  # the recurrence of average linkage
        between[a], between[:, a] = joined, joined
        between[a, a] = np.inf
        between = np.delete(np.delete(between, b, 0), b, 1)
        groups[a] = sorted(groups[a] + groups.pop(b))
    return sorted(groups)


def assign(gain: NDArray[np.floating]) -> NDArray[np.int64]:
    """The one-to-one assignment of columns to rows with the largest total gain: [N, N] -> the column of each row [N].

    Shortest augmenting paths with potentials, O(N^3), a row of work at a time in numpy (Jonker and Volgenant, 1987,
    https://doi.org/10.1007/BF02278710).

    >>> assign(np.array([[1.0, 5.0], [2.0, 9.0]])).tolist()
    [0, 1]
    """
    cost = -np.asarray(gain, dtype=np.float64)
    n = len(cost)
    u, v = np.zeros(n), np.zeros(n + 1)
    row_of = np.full(n + 1, -1)  # of each column; the last column is where a search starts
    for row in range(n):
        row_of[n], column = row, n
        best, previous, done = np.full(n, np.inf), np.full(n, n), np.zeros(n + 1, dtype=bool)
        while True:
            done[column] = True
            reduced = cost[row_of[column]] - u[row_of[column]] - v[:n]
            better = ~done[:n] & (reduced < best)
            best[better], previous[better] = reduced[better], column
            nearest = int(np.where(done[:n], np.inf, best).argmin())
            step = best[nearest]
            reached = np.flatnonzero(done)
            u[row_of[reached]] += step
            v[reached] -= step
            best[~done[:n]] -= step
            column = nearest
            if row_of[column] < 0:
                break
        while column != n:
            row_of[column], column = row_of[previous[column]], int(previous[column])
    found = np.empty(n, dtype=np.int64)
    found[row_of[:n]] = np.arange(n)
    return found
