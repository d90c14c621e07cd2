"""The error of a layer's output: damage = mean over tokens of || delta ||^2, delta the change that one unit's format makes.

The tokens' routing weights are in delta. Errors of different layers are added as they are, although the model amplifies some more
than others.
"""

from __future__ import annotations

from torch import Tensor

from moec.compiler.allocation import Problem
from moec.compiler.probe import probe


def damages(problem: Problem) -> Tensor:
    """See the module."""
    tokens = problem.text.tokens
    return probe(problem, lambda change: float(change.delta.square().sum()) / tokens)
