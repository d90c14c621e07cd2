"""REAP: the mean, over the tokens routed to an expert, of its routing weight times the length of its output.

https://arxiv.org/abs/2510.13999: removing an expert changes a token's result by at most this and as much of the expert that takes its
place. A mean and not a sum, so that experts of few tokens are kept if they matter to those. An expert that no token is routed to has 0.
"""

from __future__ import annotations

from torch import Tensor

from moec.passes.criteria import View

NEEDS = ("statistics",)


def score(view: View) -> Tensor:
    """Sum of g ||f|| divided by the number of tokens."""
    return view.statistics.weighted_norm / view.statistics.count.clamp_min(1)
