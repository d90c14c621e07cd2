"""Skip a slot whose weight is below a share of the first one's.

The rule of ODP (https://arxiv.org/abs/2410.06270) and NAEE (https://arxiv.org/abs/2402.14800), which are for K = 2 and take the median of
w1 / w0 of a layer as the share; here for any K, where all slots but the first are compared, and for any fraction.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def fit(weights: Tensor, fraction: float | None) -> dict[str, Any]:
    """See `moec.passes.rules`. Without a fraction the share is the median over all slots but the first."""
    k = weights.shape[1]
    if k < 2:
        return {}
    shares = (weights[:, 1:] / weights[:, :1].clamp(min=1e-30)).flatten().sort().values
    skipped = round(len(shares) * (0.5 if fraction is None else min(fraction * k / (k - 1), 1.0)))
    return {"ratio": min(float(shares[skipped]), 1.0) if skipped < len(shares) else 1.0}
