"""The largest element of any output of an expert: "super experts" with massive activations stay (https://arxiv.org/abs/2507.23279)."""

from __future__ import annotations

from torch import Tensor

from moec.passes.criteria import View

NEEDS = ("statistics",)


def score(view: View) -> Tensor:
    """The largest |f|."""
    return view.statistics.output_peak
