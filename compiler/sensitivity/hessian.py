"""The error that layer-wise quantisers minimise.

    damage = sum over a unit's weights of tr(dW H dW^T),     H = mean over all tokens of g^2 x x^T

x is what the weight is multiplied with, g the token's routing weight, dW the change of the weight. For a down projection it is the expected
squared error of the layer's output; for an up projection that of its own output (https://arxiv.org/abs/2210.17323).
"""

from __future__ import annotations

from torch import Tensor

from moec.compiler.allocation import Problem
from moec.compiler.change import Change
from moec.compiler.probe import probe


def damages(problem: Problem) -> Tensor:
    """See the module."""
    tokens = problem.text.tokens

    def score(change: Change) -> float:
        reached = len(change.reached.token) / tokens
        return sum(float(((error.double() @ moment.double()) * error).sum()) for error, moment in change.errors) * reached

    return probe(problem, score)
