"""The sum of an expert's routing weights: `frequency`, in which a token counts as much as the expert counts for it."""

from __future__ import annotations

from torch import Tensor

from moec.passes.criteria import View

NEEDS = ("statistics",)


def score(view: View) -> Tensor:
    """The sum of g."""
    return view.statistics.weight
