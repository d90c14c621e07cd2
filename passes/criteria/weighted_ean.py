"""The sum over an expert's tokens of its routing weight times the length of its output: REAP's score with a sum in place of the mean."""

from __future__ import annotations

from torch import Tensor

from moec.passes.criteria import View

NEEDS = ("statistics",)


def score(view: View) -> Tensor:
    """The sum of g ||f||."""
    return view.statistics.weighted_norm
