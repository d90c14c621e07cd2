"""The sum over all tokens of the router's score for an expert, chosen or not: the "soft" heavy hitters of https://arxiv.org/abs/2404.05089."""

from __future__ import annotations

from torch import Tensor

from moec.passes.criteria import View

NEEDS = ("statistics",)


def score(view: View) -> Tensor:
    """The sum of scores."""
    return view.statistics.score
