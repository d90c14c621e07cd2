"""The second-order expansion of the KL divergence in the change of a layer's output.

    KL(reference || changed) = 1/2 mean over tokens of E over labels of (sum over d of G_d delta_d)^2  +  third-order terms

G [D] is the gradient of a window's log-likelihood by the layer's output at a token, for labels drawn from the reference itself, and delta
[D] the change that one unit's format makes: the generalised Gauss-Newton matrix (https://arxiv.org/abs/1412.1193) by its samples, with the
products within a token kept (`fisher` has the diagonal alone) and those between tokens taken to average out. Nats a token.

Any matrix is measured alike, so that all may share one budget. Of the projection to the logits the mean over labels is taken exactly: it is
the variance of the logits' change under the model's own distribution. What the two uses of a tied matrix do is added up.
"""

from __future__ import annotations

from torch import Tensor

from moec.compiler.allocation import Problem
from moec.compiler.probe import probe
from moec.compiler.roles import KINDS as EVERY

KINDS = EVERY


def damages(problem: Problem, *, samples: int = 2) -> Tensor:
    """See the module.

    Args:
        samples: labels drawn for each token; the noise of the estimate falls with its root.
    """
    tokens = problem.text.tokens

    return probe(problem, lambda change: float(change.squares.sum()) / (2 * tokens), "sampled", samples)
