"""HC-SMoE: experts whose outputs are near each other on average, by agglomerative clustering (https://arxiv.org/abs/2410.08589).

The feature of an expert is its mean output over all tokens, whether they are routed to it or not; clusters are joined by average linkage
of Euclidean distances.
"""

from __future__ import annotations

import torch

from moec.compiler.calibration.capture import mean_outputs
from moec.compiler.clustering import average_linkage
from moec.passes.criteria import View

NEEDS = ("statistics", "inputs")
ALIGN = False


def group(view: View, keep: int) -> list[list[int]]:
    """The members of each of `keep` clusters."""
    feature = mean_outputs(view.model, view.layer, view.inputs.x).double()
    return average_linkage(torch.cdist(feature, feature).cpu().numpy(), keep)
