"""NAEE: the experts that together give the layer's output with the least squared error (https://arxiv.org/abs/2402.14800).

The router chooses among the kept experts with unchanged scores, and weights are normalised again where the router does so. All subsets
are tried where there are few; otherwise experts are taken away one at a time, from the best few subsets of each size (the paper is for 8
experts, and sampling subsets of many does badly: https://arxiv.org/abs/2407.00945).
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations
from math import comb

import torch
from torch import Tensor

from moec.compiler.calibration.capture import output_products
from moec.compiler.errors import MoecError
from moec.compiler.ops import router, router_scores
from moec.passes.criteria import View

NEEDS = ("inputs",)


def choose(view: View, keep: int, *, exhaustive: int = 2000, beam: int = 2) -> list[int]:
    """The best subset of `keep` experts.

    Args:
        exhaustive: try all subsets where there are at most so many.
        beam: otherwise go on from so many subsets of each size.
    """
    if exhaustive < 0 or beam < 1:
        raise MoecError(f"the criterion naee: exhaustive is {exhaustive} and beam {beam}: expected at least 0 and 1")
    error, everything = _Error(view), tuple(range(view.layer.count))
    if comb(len(everything), keep) <= exhaustive:
        return list(_least(error, combinations(everything, keep), 1)[0])
    front = [everything]
    for size in range(len(everything) - 1, keep - 1, -1):
        smaller = {tuple(e for e in subset if e != out) for subset in front for out in subset}
        front = _least(error, sorted(smaller), beam if size > keep else 1)
    return list(front[0])


def _least(error: _Error, subsets: Iterable[tuple[int, ...]], count: int) -> list[tuple[int, ...]]:
    found = sorted((error(subset), subset) for subset in subsets)
    return [subset for _, subset in found[:count]]


class _Error:
    """The squared error of a layer's output for a subset of its experts, summed over tokens."""

    def __init__(self, view: View) -> None:
        inputs, self.attrs = view.inputs, dict(view.layer.router.attrs)
        score = str(self.attrs.get("score", "softmax"))
        self.attrs |= {"score": "identity", "normalize": bool(self.attrs.get("normalize")) or score == "softmax_topk", "groups": 1}
        self.scores = router_scores(inputs.logits, "softmax" if score == "softmax_topk" else score)  # [N, E]
        names = view.layer.router.inputs
        self.bias = view.model.load(names[1]) if len(names) > 1 and names[1] else torch.zeros(view.layer.count)
        self.products = output_products(view.model, view.layer, inputs.x)  # [N, E, E]
        self.whole = self._weights(list(range(view.layer.count)))

    def _weights(self, subset: list[int]) -> Tensor:
        """The routing weights [N, E] when only a subset can be chosen."""
        weights, at = router(self.scores[:, subset], self.bias[subset], **self.attrs)
        return torch.zeros_like(self.scores).scatter(1, torch.tensor(subset)[at], weights)

    def __call__(self, subset: tuple[int, ...]) -> float:
        change = self._weights(list(subset)) - self.whole
        return float(((self.products @ change[:, :, None])[:, :, 0] * change).sum())
