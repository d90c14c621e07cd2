"""Expert activation norm: the sum of the lengths of an expert's outputs over its tokens (a baseline of https://arxiv.org/abs/2510.13999)."""

from __future__ import annotations

from torch import Tensor

from moec.passes.criteria import View

NEEDS = ("statistics",)


def score(view: View) -> Tensor:
    """The sum of ||f||."""
    return view.statistics.output_norm
