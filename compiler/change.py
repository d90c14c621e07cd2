"""A unit of weights in another format, as objectives of bit assignment see it: what its node gives changes by a sum of products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from moec.compiler.allocation import Unit


@dataclass(frozen=True)
class Reached:
    """The tokens that reach one expert, or one other node.

    Args:
        token: [n], their places in the text.
        window: [n], the window of text of each.
        routed: [n], their routing weights (ones where nothing routes).
        gradients: [S, n, D], S samples of the gradient of a window's log-likelihood by the node's output; None if not asked for.
        logits: [n, V], of the projection to the logits only.
    """

    token: Tensor
    window: Tensor
    routed: Tensor
    gradients: Tensor | None = None
    logits: Tensor | None = None

    @cached_property
    def pulled(self) -> Tensor:
        """The gradients by the unit's own output, before its routing weight: [S, n, D]."""
        assert self.gradients is not None
        return self.gradients * self.routed[:, None]


@dataclass(frozen=True)
class Part:
    """A summand `value` [n, K] times `through` [D, K] transposed of a change; `pulled` [S, n, K] are the gradients by `value`."""

    value: Tensor
    through: Tensor | None = None
    pulled: Tensor | None = None

    @property
    def moved(self) -> Tensor:
        """[n, D]."""
        return self.value if self.through is None else self.value @ self.through.T


@dataclass(frozen=True)
class Change:
    """One unit in one format. What is made of it is made when it is asked for.

    Args:
        unit, node: the weights, and which of the nodes that read them.
        reached: the tokens.
        parts: what the change of their outputs adds up of, before the routing weights.
        weights: gives, of each member, the change of the weight [N, K] and the second moment of what it is multiplied with [K, K].
    """

    unit: Unit
    node: str
    reached: Reached
    parts: tuple[Part, ...]
    weights: Callable[[], list[tuple[Tensor, Tensor]]]

    @cached_property
    def delta(self) -> Tensor:
        """[n, D], the change of the node's output at the tokens."""
        total = self.parts[0].moved
        for part in self.parts[1:]:
            total = total + part.moved
        return total * self.reached.routed[:, None]

    @property
    def squares(self) -> Tensor:
        """[n], the mean over labels of the square of the change of the log-likelihood, to first order in the change of the output.

        By samples of the gradient; of the logits themselves exactly, as the variance of their change under the model's distribution.
        """
        if self.reached.logits is not None:
            p = self.reached.logits.softmax(-1)
            return (p * (self.delta - (p * self.delta).sum(-1, keepdim=True)).square()).sum(-1)
        slopes = torch.stack(
            [_along(self.reached.pulled, part.moved) if part.pulled is None else _along(part.pulled, part.value) for part in self.parts]
        )
        return slopes.sum(0).square().mean(0)

    @property
    def errors(self) -> list[tuple[Tensor, Tensor]]:
        """See `weights`."""
        return self.weights()


def _along(gradients: Tensor, moved: Tensor) -> Tensor:
    """The inner products of gradients [S, n, K] with changes [n, K]: [S, n]."""
    return torch.stack([torch.linalg.vecdot(gradient, moved) for gradient in gradients])
