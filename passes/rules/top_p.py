"""Skip the slots before which the weights already reach a share of their sum (https://arxiv.org/abs/2403.07652)."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def fit(weights: Tensor, fraction: float | None) -> dict[str, Any]:
    """See `moec.passes.rules`. Without a fraction the share is the median over all slots but the first."""
    k = weights.shape[1]
    if k < 2:
        return {}
    before = (weights.cumsum(1)[:, :-1] / weights.sum(1, keepdim=True).clamp(min=1e-30)).flatten().sort(descending=True).values
    skipped = round(len(before) * (0.5 if fraction is None else min(fraction * k / (k - 1), 1.0)))
    return {"top_p": min(max(float(before[skipped - 1]), 1e-6), 1.0)} if skipped else {}
