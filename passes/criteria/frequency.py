"""How many tokens are routed to an expert: the "actual" heavy hitters of https://arxiv.org/abs/2404.05089."""

from __future__ import annotations

from torch import Tensor

from moec.passes.criteria import View

NEEDS = ("statistics",)


def score(view: View) -> Tensor:
    """The number of tokens."""
    return view.statistics.count
