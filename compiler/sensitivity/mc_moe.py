"""MC-MoE's significance of experts: how often and how strongly one is used, times the error of its outputs.

    damage[i][j] = phi_i^alpha  w_i^beta  eps_ij^gamma

phi_i: the share of the layer's choices that fell on expert i; w_i: its share of the routing weights; eps_ij: the Frobenius norm of the
change of the layer's output when expert i alone has format j, summed over windows of text. Every layer has one unit at least in each of
the two widest formats. https://arxiv.org/abs/2410.06270; the bit-widths that its authors published come from alpha, beta, gamma = 1, 1.5, 1
(their text says gamma = 2), which `benchmarks/mc_moe_oracle.py` shows. Made for one program a layer (`scope: layer`): damages of different
layers are not comparable.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from moec.compiler.allocation import Problem
from moec.compiler.change import Change
from moec.compiler.probe import probe
from moec.compiler.solver import AtLeast


def significance(
    frequency: ArrayLike, weight: ArrayLike, loss: ArrayLike, alpha: float = 1.0, beta: float = 1.5, gamma: float = 1.0
) -> NDArray[np.float64]:
    """The damages of one layer: [E, O].

    Args:
        frequency, weight: [E], how often experts were chosen and the sum of their routing weights, in any unit.
        loss: [E, O], the norm of the output's change by expert and format.
    """
    phi, w = (np.asarray(v, np.float64) / max(np.sum(v), 1e-30) for v in (frequency, weight))
    result: NDArray[np.float64] = (phi**alpha * w**beta)[:, None] * np.asarray(loss, np.float64) ** gamma
    return result


def widest(sizes: ArrayLike, members: Sequence[int]) -> list[AtLeast]:
    """The conditions that some unit has the widest format, and some unit the second widest; pairs count from 0 among the members."""
    order = np.argsort(np.asarray(sizes)[members].sum(0), kind="stable")
    return [AtLeast(tuple((at, int(option)) for at in range(len(members)))) for option in order[:-3:-1]] if len(order) > 2 else []


def conditions(problem: Problem, members: Sequence[int]) -> list[AtLeast]:
    """See `widest`."""
    return widest(problem.sizes, members)


def damages(problem: Problem, *, alpha: float = 1.0, beta: float = 1.5, gamma: float = 1.0) -> Tensor:
    """See the module."""
    used: dict[str, tuple[float, float]] = {}

    def score(change: Change) -> float:
        reached = change.reached
        used[change.unit.name] = len(reached.token), float(reached.routed.sum())
        squares = change.delta.new_zeros(problem.text.ids.shape[0])
        squares.index_add_(0, reached.window, change.delta.square().sum(1))
        return float(squares.sqrt().sum())

    loss = probe(problem, score).cpu().numpy()
    result = torch.zeros(len(problem.units), len(problem.formats), dtype=torch.float64, device="cpu")
    for node in {unit.node for unit in problem.units}:
        members = [i for i, unit in enumerate(problem.units) if unit.node == node]
        frequency, weight = np.array([used.get(problem.units[i].name, (0.0, 0.0)) for i in members]).T
        result[members] = torch.from_numpy(significance(frequency, weight, loss[members], alpha, beta, gamma))
    return result
