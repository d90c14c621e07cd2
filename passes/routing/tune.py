"""Joint training of the mask routers of all layers against the model's own next-token distribution (MC#, https://arxiv.org/abs/2510.10962).

    loss = KL(model || masked model) + price * (fraction of activations that run)

Masks keep the first r experts; r is sampled by Gumbel-softmax with a falling temperature (https://arxiv.org/abs/1611.01144). The price is
a multiplier that moves until the wanted fraction is dropped. All weights are held in float32: this is for models that fit so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from moec.compiler.context import Context
from moec.compiler.interpreter import bind_symbols, evaluate
from moec.compiler.layers import moe_layers
from moec.compiler.model import Model
from moec.passes.routing.draws import Draws
from moec.passes.routing.masks import MaskRouter

Change = Callable[[Tensor, Tensor], Tensor]
"""From what experts read [B, T, D] and the routing weights [B, T, K] to other weights."""

FIRST_TEMPERATURE, LAST_TEMPERATURE = 1.0, 0.3
WINDOWS = 2
"""Windows of text in a step."""


class Differentiable:
    """A model whose results can be differentiated with respect to what changes its routing weights."""

    def __init__(self, model: Model) -> None:
        self.graph = model.graph
        self.weights = {name: model.load(name) for name in model.graph.params}

    def __call__(self, ids: Tensor, changes: Mapping[str, Change]) -> Tensor:
        """Logits [B, T, V] of windows [B, T]; `changes` by the names of `experts` nodes."""
        values: dict[str, Tensor] = {"ids": ids, "positions": torch.arange(ids.shape[1]).expand(len(ids), -1)}
        values = {v.name: values[v.name] for v in self.graph.inputs}
        symbols = bind_symbols(self.graph, values)
        for node in self.graph.nodes:
            tensors = [None if not n else self.weights[n] if n in self.weights else values[n] for n in node.inputs]
            if node.name in changes:
                x, weights = tensors[0], tensors[2]
                assert x is not None and weights is not None
                tensors[2] = changes[node.name](x, weights)
            outputs = evaluate(node, tensors, symbols, torch.float32, ids.device)
            values.update(zip((o.name for o in node.outputs), outputs, strict=True))
        return values[self.graph.outputs[0]]


def masked(weights: Tensor, keep: Tensor, *, normalize: bool) -> Tensor:
    """Routing weights [..., K] of which the first r run with probability keep[..., r - 1]."""
    mask = keep.flip(-1).cumsum(-1).flip(-1)  # slot k runs if r > k
    kept = weights * mask
    if normalize:
        kept = kept * (weights.sum(-1, keepdim=True) / kept.sum(-1, keepdim=True).clamp(min=1e-30))
    return kept


def tune(
    model: Model, routers: dict[str, MaskRouter], target: float, context: Context, *, steps: int, normalize: bool, rate: float = 3e-3
) -> dict[str, MaskRouter]:
    """Mask routers trained together, starting from those of each layer."""
    text = context.need_text("mask_router")
    run, windows = Differentiable(model), text.ids.to(torch.get_default_device())
    names = [layer.name for layer in moe_layers(model.graph) if layer.name in routers]
    params = [p for name in names for p in (routers[name].weight, routers[name].bias)]
    for p in params:
        p.requires_grad_()
    optimiser = torch.optim.Adam(params, lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps, eta_min=rate / 10)
    draws = Draws(context.seed)
    price = 0.05
    for step in context.progress.track(range(steps), "train mask routers"):
        ids = windows[draws.below(len(windows), WINDOWS)]
        temperature = FIRST_TEMPERATURE * (LAST_TEMPERATURE / FIRST_TEMPERATURE) ** (step / max(1, steps - 1))
        running: list[Tensor] = []

        def change(name: str, temperature: float = temperature, running: list[Tensor] = running) -> Change:
            def of(x: Tensor, weights: Tensor) -> Tensor:
                logits = routers[name].logits(x, weights)
                noise = -torch.log(-torch.log(draws.uniform(logits.shape).clamp(1e-9, 1 - 1e-7)))
                keep = ((logits + noise) / temperature).softmax(-1)
                running.append((keep * torch.arange(1, keep.shape[-1] + 1)).sum(-1).mean() / keep.shape[-1])
                return masked(weights, keep, normalize=normalize)

            return of

        with torch.no_grad():
            truth = run(ids, {}).log_softmax(-1)
        found = run(ids, {name: change(name) for name in names}).log_softmax(-1)
        runs = torch.stack(running).mean()
        divergence = (truth.exp() * (truth - found)).sum(-1).mean()
        optimiser.zero_grad()
        (divergence + price * runs).backward()
        optimiser.step()
        schedule.step()
        price *= float(torch.exp(2 * (runs.detach() - (1 - target)).clamp(-0.1, 0.1)))
    return {name: MaskRouter(r.weight.detach(), r.bias.detach(), r.mean, r.std) for name, r in routers.items()}


@torch.no_grad()
def mask_logits(model: Model, routers: Mapping[str, MaskRouter], ids: Tensor, *, normalize: bool, shift: float = 0.0) -> list[Tensor]:
    """The logits [N, K] of every mask router on windows [W, T], while all of them mask by arg max."""
    run, found = Differentiable(model), {name: list[Tensor]() for name in routers}

    def change(name: str) -> Change:
        def of(x: Tensor, weights: Tensor) -> Tensor:
            logits = routers[name].logits(x, weights)
            found[name].append(logits.flatten(0, -2))
            best = (logits + shift * torch.arange(logits.shape[-1])).argmax(-1)
            return masked(weights, torch.nn.functional.one_hot(best, logits.shape[-1]).float(), normalize=normalize)

        return of

    for part in ids.to(torch.get_default_device()).split(4):
        run(part, {name: change(name) for name in routers})
    return [torch.cat(parts) for parts in found.values()]
