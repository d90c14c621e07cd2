"""The length of an expert's row of the router's matrix: what can be said without calibration text."""

from __future__ import annotations

import torch
from torch import Tensor

from moec.passes.criteria import View

NEEDS: tuple[str, ...] = ()


def score(view: View) -> Tensor:
    """The Euclidean norm of each row."""
    gate = view.layer.require_gate("the criterion router_norm")
    length: Tensor = torch.linalg.vector_norm(view.model.load(gate.inputs[1]), dim=1)
    return length
