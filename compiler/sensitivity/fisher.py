"""The error of a layer's output weighted by the diagonal of the Fisher information: GEMQ's estimate of the loss.

    damage = 1/2 mean over tokens of sum over d of (G_d delta_d)^2

G [D] is the gradient of the log-likelihood of the window by the layer's output at the token, delta [D] the change that one unit's format
makes. https://arxiv.org/abs/2605.23078 takes the text's own next tokens as labels (`labels: text`); labels drawn from the model's own
distribution (`labels: sampled`) make it the Fisher information of the reference, which is what the KL divergence
expands to. Not for the projection to the logits, whose gradients are as many as the logits.
"""

from __future__ import annotations

from torch import Tensor

from moec.compiler.allocation import Problem
from moec.compiler.change import Change
from moec.compiler.probe import probe

KINDS = ("experts", "attention", "shared", "dense", "embedding")


def damages(problem: Problem, *, labels: str = "text", samples: int = 1) -> Tensor:
    """See the module."""
    tokens = problem.text.tokens

    def score(change: Change) -> float:
        gradients = change.reached.gradients
        assert gradients is not None
        return float((gradients * change.delta).square().sum()) / (2 * tokens * len(gradients))

    return probe(problem, score, labels, samples)
