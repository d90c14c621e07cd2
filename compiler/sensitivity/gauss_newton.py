"""The second-order expansion of the KL divergence in the change of a layer's output.

    KL(reference || changed) = 1/2 mean over tokens of E over labels of (sum over d of G_d delta_d)^2  +  third-order terms

G [D] is the gradient of a window's log-likelihood by the layer's output at a token, for labels drawn from the reference itself, and delta
[D] the change that one unit's format makes: the generalised Gauss-Newton matrix (https://arxiv.org/abs/1412.1193) by its samples, with the
products within a token kept (`fisher` has the diagonal alone) and those between tokens taken to average out. Nats a token.
"""

from __future__ import annotations

from torch import Tensor

from moec.compiler.allocation import Problem
from moec.compiler.probe import Change, output_gradients, probe


def damages(problem: Problem, *, samples: int = 2) -> Tensor:
    """See the module.

    Args:
        samples: labels drawn for each token; the noise of the estimate falls with its root.
    """
    tokens = problem.text.tokens

    def score(change: Change) -> float:
        assert change.gradients is not None
        return float((change.gradients * change.delta).sum(-1).square().sum()) / (2 * tokens * len(change.gradients))

    return probe(problem, score, output_gradients(problem, samples, "sampled"))
