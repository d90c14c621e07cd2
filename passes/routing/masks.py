"""Mask routers: from a token to how many of its K experts run, and how one layer's is fitted to the layer's own result.

A mask router reads x [D] and the K routing weights, standardised, and gives K logits; logit r - 1 is for keeping the first r experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moec.passes.routing.draws import Draws
from moec.passes.routing.observe import Block


@dataclass
class MaskRouter:
    """The parameters of one layer, over standardised features (x, w) [D + K].

    Args:
        weight: [K, D + K].
        bias: [K].
        mean, std: [D + K], of the features on calibration text.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    std: Tensor

    def logits(self, x: Tensor, weights: Tensor) -> Tensor:
        """x [..., D] and weights [..., K] -> [..., K]."""
        features = (torch.cat((x, weights), -1) - self.mean) / self.std
        return torch.nn.functional.linear(features, self.weight, self.bias)

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias over the features as they are."""
        weight = self.weight.double() / self.std.double()
        return weight.float(), (self.bias.double() - weight @ self.mean.double()).float()


def keep_errors(block: Block, *, normalize: bool) -> Tensor:
    """[N, K]: the squared error of a layer's result with the first r = 1 ... K experts, relative to the residual stream after it.

    What follows normalises the stream, so that an error counts by its share of the stream.
    """
    whole = block.slots.sum(1)
    kept = block.slots.cumsum(1)
    if normalize:
        sums = block.weights.cumsum(1)
        kept = kept * (sums[:, -1:] / sums.clamp(min=1e-30))[..., None]
    scale = (block.residual + whole).square().sum(-1, keepdim=True).clamp(min=1e-30)
    return (kept - whole[:, None]).square().sum(-1) / scale


def fit_locally(block: Block, errors: Tensor, target: float, *, steps: int, seed: int) -> MaskRouter:
    """A mask router whose expected error, sum over r of pi_r error_r, is least while it drops the fraction `target` in expectation.

    The distribution over r is small enough to sum over, so that no sample of it is needed. The price of an expert is a multiplier that
    rises while too few are dropped.
    """
    k = errors.shape[1]
    features = torch.cat((block.x, block.weights), -1)
    mean, std = features.mean(0), features.std(0).clamp(min=1e-6)
    features = (features - mean) / std
    errors = errors / errors[:, 0].mean().clamp(min=1e-30)
    draws = Draws(seed)
    weight = (draws.normal(k, features.shape[1]) * 0.01).requires_grad_()
    bias = torch.zeros(k, requires_grad=True)
    optimiser = torch.optim.Adam([weight, bias], lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps, eta_min=1e-3)
    fractions = torch.arange(1, k + 1) / k  # of activations that run
    price = 1.0
    size = min(len(features), 8192)
    for _ in range(steps):
        rows = draws.below(len(features), size)
        chosen = torch.nn.functional.linear(features[rows], weight, bias).softmax(-1)
        runs = (chosen * fractions).sum(-1).mean()
        loss = (chosen * errors[rows]).sum(-1).mean() + price * runs
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        price *= float(torch.exp((runs.detach() - (1 - target)).clamp(-0.2, 0.2)))
    return MaskRouter(weight.detach(), bias.detach(), mean, std)


def shift_for(logits: list[Tensor], target: float) -> float:
    """How much to favour each expert more, logits [N, K] + shift * (0 ... K - 1) in all layers, so that arg max drops `target` of all."""
    total = sum(part.numel() for part in logits)
    low, high = -50.0, 50.0
    for _ in range(40):
        middle = (low + high) / 2
        kept = sum(int((part + middle * torch.arange(part.shape[1])).argmax(-1).sum()) + len(part) for part in logits)
        low, high = (middle, high) if kept < (1 - target) * total else (low, middle)
    return (low + high) / 2
