"""The largest element of any output of an expert: experts of massive activations ("super experts", https://arxiv.org/abs/2507.23279) stay."""

from __future__ import annotations

from torch import Tensor

from moec.passes.criteria import View

NEEDS = ("statistics",)


def score(view: View) -> Tensor:
    """The largest |f|."""
    return view.statistics.output_peak
