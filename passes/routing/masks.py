"""Mask routers: from a token to how many of its K experts run, and how one layer's is fitted to the layer's own result.

A mask router reads x [D] and the K routing weights, standardised, and gives K logits; logit r - 1 is for keeping the first r experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moec.passes.routing.draws import Draws
from moec.passes.routing.observe import Block
from moec.passes.rules import top_p

_SHARPNESS = 4.0
"""The spread of the first logits: how sure a mask router starts."""
_DECAY = 1e-5
"""Penalty on the square of what reads x."""
_RUN = 16
"""Tokens in a row that are tested on or not."""


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


def start_from_rule(block: Block, target: float) -> MaskRouter:
    """The mask router that is the rule `top_p`: slot k runs while what came before it is less than a share p of all.

    Logit r - 1 is the sum over the first r slots of how far each is from being skipped, so that arg max keeps just those that run; the
    rule is linear in the weights. From here on x can say what weights do not.
    """
    k, width = block.weights.shape[1], block.x.shape[1]
    features = torch.cat((block.x, block.weights), -1)
    mean, std = features.mean(0), features.std(0).clamp(min=1e-6)
    share = top_p.fit(block.weights, target).get("top_p", 1.0)
    margin = torch.full((k, k), share)  # margin[j] @ weights: the share of all less what slots 0 ... j - 1 have
    margin -= torch.ones(k, k).tril(-1)
    margin[0] = 0  # the first slot always runs
    sharpness = _SHARPNESS / (block.weights @ margin.T)[:, 1:].std().clamp(min=1e-6)
    weight = torch.zeros(k, width + k)
    weight[:, width:] = margin.cumsum(0) * sharpness
    return MaskRouter(weight * std, weight @ mean, mean, std)


def fit_locally(block: Block, errors: Tensor, target: float, *, steps: int, seed: int) -> tuple[MaskRouter, dict[str, float]]:
    """A mask router whose expected error, sum over r of pi_r error_r, is least while it drops the fraction `target` in expectation.

    The distribution over r is small enough to sum over, so that no sample of it is needed. The price of an expert is a multiplier that
    rises while too few are dropped. One token in eight is not trained on: there the result is compared with the rule that it started from
    at equal drop, and the better one is returned.

    Returns:
        The router, and the error of the rule and of what was learned there, relative to dropping all but the first expert.
    """
    k = errors.shape[1]
    start = start_from_rule(block, target)
    errors = errors / errors[:, 0].mean().clamp(min=1e-30)
    test = torch.arange(len(errors)) // _RUN % 8 == 7
    features = ((torch.cat((block.x, block.weights), -1) - start.mean) / start.std)[~test]
    wanted, draws = errors[~test], Draws(seed)
    weight, bias = (value.clone().requires_grad_() for value in (start.weight, start.bias))
    optimiser = torch.optim.Adam([weight, bias], lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(1, steps), eta_min=1e-4)
    fractions = torch.arange(1, k + 1) / k  # of activations that run
    price, size = float(errors[:, 0].mean()) / 10, min(len(features), 8192)
    for _ in range(steps):
        rows = draws.below(len(features), size)
        chosen = torch.nn.functional.linear(features[rows], weight, bias).softmax(-1)
        runs = (chosen * fractions).sum(-1).mean()
        decay = _DECAY * weight[:, : -k or None].square().sum()
        loss = (chosen * wanted[rows]).sum(-1).mean() + price * runs + decay
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        price *= float(torch.exp((runs.detach() - (1 - target)).clamp(-0.2, 0.2)))
    learned = MaskRouter(weight.detach(), bias.detach(), start.mean, start.std)
    found = {}
    for name, router in (("rule", start), ("learned", learned)):
        logits = router.logits(block.x[test], block.weights[test])
        found[name] = error_at(logits, errors[test], target) if len(logits) else 0.0
    return (learned if found["learned"] < found["rule"] else start), found


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
