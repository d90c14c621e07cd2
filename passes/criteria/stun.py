"""STUN's first stage: experts that behave alike are clustered, and one of each cluster stays (https://arxiv.org/abs/2409.06211).

Two experts are alike where their rows of the router's matrix are near each other and tokens choose both at once. No forward pass
besides the calibration. The one that stays is the one whose row is nearest to the mean of its cluster.
"""

from __future__ import annotations

import torch

from moec.compiler.clustering import average_linkage
from moec.passes.criteria import View

NEEDS = ("statistics",)


def choose(view: View, keep: int, *, rows: float = 1.0, together: float = 1.0) -> list[int]:
    """One expert of each of `keep` clusters.

    Args:
        rows: weight of the distance of the router's rows, as a share of the largest.
        together: weight of the share of tokens that two experts have in common, as a share of the largest.
    """
    gate = view.layer.require_gate("the criterion stun")
    matrix = view.model.load(gate.inputs[1])
    far = torch.cdist(matrix, matrix).double()
    common = view.statistics.together.double().fill_diagonal_(0)
    distance = rows * far / far.max().clamp_min(1e-30) - together * common / common.max().clamp_min(1)
    clusters = average_linkage(distance.cpu().numpy(), keep)
    return [min(c, key=lambda e, c=c: float((matrix[e] - matrix[c].mean(0)).norm())) for c in clusters]  # type: ignore[misc]  # a default binds c
