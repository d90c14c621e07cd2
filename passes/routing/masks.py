"""Mask routers: from a token to how many of its K experts run, and how one layer's is fitted to the layer's own result.

A mask router reads x [D] and the logarithms of the K routing weights and gives K logits; logit r - 1 is for keeping the first r experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moec.passes.routing.draws import Draws
from moec.passes.routing.observe import Block
from moec.passes.rules import ratio

LEAST_WEIGHT = 1e-6
"""Routing weights below this are taken as this, since their logarithms are read."""
_DECAY = 1e-5
"""Penalty on the square of what reads x."""
_RUN = 16
"""Tokens in a row that are tested on or not."""


@dataclass
class MaskRouter:
    """The parameters of one layer, over standardised features (x, log w) [D + K].

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
        features = (features_of(x, weights) - self.mean) / self.std
        return torch.nn.functional.linear(features, self.weight, self.bias)

    def shifted(self, shift: float) -> MaskRouter:
        """This router with every further expert favoured more."""
        return replace(self, bias=self.bias + shift * torch.arange(len(self.bias)))

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


def features_of(x: Tensor, weights: Tensor) -> Tensor:
    """What a mask router reads: x [..., D] and weights [..., K] -> [..., D + K]."""
    return torch.cat((x, weights.clamp(min=LEAST_WEIGHT).log()), -1)


def from_margins(margin: Tensor, offset: Tensor, features: Tensor) -> MaskRouter:
    """The mask router whose logit r - 1 is the sum over slots 2 ... r of their margins, so that slots run while margins are positive.

    Args:
        margin: [K - 1, D + K] and offset [K - 1]: of each slot but the first, over features as they are.
        features: [N, D + K], for the scale of each.
    """
    mean, std = features.mean(0), features.std(0).clamp(min=1e-6)
    weight = torch.cat((torch.zeros_like(margin[:1]), margin)).cumsum(0)
    bias = torch.cat((torch.zeros_like(offset[:1]), offset)).cumsum(0)
    return MaskRouter(weight * std, bias + weight @ mean, mean, std)


def start_from_rule(block: Block, target: float) -> MaskRouter:
    """The mask router that is the rule `ratio`: slot k runs while log w_k > log w_1 + log ratio, which is linear in its features."""
    k, width = block.weights.shape[1], block.x.shape[1]
    margin = torch.zeros(k - 1, width + k)
    margin[:, width:] = torch.eye(k)[1:] - torch.eye(k)[:1]
    share = max(ratio.fit(block.weights, target).get("ratio", 0.0), LEAST_WEIGHT)
    return from_margins(margin, torch.full((k - 1,), -math.log(share)), features_of(block.x, block.weights))


def regress(features: Tensor, errors: Tensor, penalty: float = 1e-2) -> MaskRouter:
    """The mask router whose margins are the expected logarithms of what each further expert takes off the error, by ridge regression."""
    gain = (errors[:, :-1] - errors[:, 1:]).double()
    gain = gain.clamp(min=float(gain.abs().mean()) * 1e-4).log()
    wide = features.double()
    mean, std, level = wide.mean(0), wide.std(0).clamp(min=1e-6), gain.mean(0)
    wide = (wide - mean) / std
    moment = wide.T @ wide
    moment.diagonal().add_(penalty * len(wide))
    margin = torch.linalg.solve(moment, wide.T @ (gain - level)).T / std
    return from_margins(margin.float(), (level - margin @ mean).float(), features)


def fit_locally(block: Block, errors: Tensor, target: float, *, steps: int, seed: int) -> tuple[MaskRouter, dict[str, float]]:
    """A mask router for a layer that makes small errors while it drops the fraction `target`.

    Three are made: the rule `ratio`; a regression of what each expert takes off the error; and, from the better of these, one that descends
    the expected error, sum over r of pi_r error_r (few enough to sum over: no samples are needed), plus a price on experts that moves
    until the target is met. One token in eight is kept from training, and the best there at equal drop is returned.

    Returns:
        The router, and the mean error of each there, relative to dropping all but the first expert.
    """
    errors = errors / errors[:, 0].mean().clamp(min=1e-30)
    test = torch.arange(len(errors)) // _RUN % 8 == 7
    train = ~test
    if not test.any():  # a text of a few tokens
        test = train
    features = features_of(block.x, block.weights)
    made = {"rule": start_from_rule(block, target), "regression": regress(features[train], errors[train])}
    measure = {n: error_at(r.logits(block.x[test], block.weights[test]), errors[test], target) for n, r in made.items()}
    start = made[min(measure, key=lambda n: measure[n])]
    if steps:
        start = start.shifted(shift_for([start.logits(block.x, block.weights)], target))
        made["descent"] = descend((features[train] - start.mean) / start.std, errors[train], start, target, steps=steps, seed=seed)
        measure["descent"] = error_at(made["descent"].logits(block.x[test], block.weights[test]), errors[test], target)
    return made[min(measure, key=lambda n: measure[n])], measure


def descend(features: Tensor, errors: Tensor, start: MaskRouter, target: float, *, steps: int, seed: int) -> MaskRouter:
    """A mask router after some steps of Adam; see `fit_locally`. Features are standardised."""
    k, draws = errors.shape[1], Draws(seed)
    weight, bias = (value.clone().requires_grad_() for value in (start.weight, start.bias))
    optimiser = torch.optim.Adam([weight, bias], lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps, eta_min=1e-4)
    fractions = torch.arange(1, k + 1) / k  # of activations that run
    price, size = float(errors[:, 0].mean()) / 10, min(len(features), 8192)
    for _ in range(steps):
        rows = draws.below(len(features), size)
        chosen = torch.nn.functional.linear(features[rows], weight, bias).softmax(-1)
        runs = (chosen * fractions).sum(-1).mean()
        decay = _DECAY * weight[:, :-k].square().sum()
        loss = (chosen * errors[rows]).sum(-1).mean() + price * runs + decay
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        price *= float(torch.exp((runs.detach() - (1 - target)).clamp(-0.2, 0.2)))
    return MaskRouter(weight.detach(), bias.detach(), start.mean, start.std)


def error_at(logits: Tensor, errors: Tensor, target: float) -> float:
    """The mean of errors [N, K] where arg max of logits [N, K], shifted to drop `target` of all, keeps r of K."""
    best = (logits + shift_for([logits], target) * torch.arange(logits.shape[1])).argmax(-1)
    return float(errors.gather(1, best[:, None]).mean())


def shift_for(logits: list[Tensor], target: float) -> float:
    """How much to favour each expert more, logits [N, K] + shift * (0 ... K - 1) in all layers, so that arg max drops `target` of all."""
    total = sum(part.numel() for part in logits)
    low, high = -50.0, 50.0
    for _ in range(40):
        middle = (low + high) / 2
        kept = sum(int((part + middle * torch.arange(part.shape[1])).argmax(-1).sum()) + len(part) for part in logits)
        low, high = (middle, high) if kept < (1 - target) * total else (low, middle)
    return (low + high) / 2
