"""Dynamic skipping as NAEE has it (https://arxiv.org/abs/2402.14800): skip below beta times the first weight, beta the median of w1 / w0.

The paper is for K = 2. With a larger K the same beta holds for all later slots, so that more than half of those are skipped.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moec.compiler.errors import MoecError


def fit(weights: Tensor, fraction: float | None) -> dict[str, Any]:
    """See `moec.passes.rules`."""
    if fraction is not None:
        raise MoecError("skip_experts: the rule naee has a threshold of its own (a median) and takes no target: use the rule ratio")
    if weights.shape[1] < 2:
        return {}
    return {"ratio": min(float((weights[:, 1] / weights[:, 0].clamp(min=1e-30)).median()), 1.0)}
