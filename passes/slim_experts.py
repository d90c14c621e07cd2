"""Make experts narrower: keep the neurons that matter, and let the down projection make up for the others.

    @up: f32[E, 2F, D], @down: f32[E, D, F]   ->   @up: f32[E, 2F', D], @down: f32[E, D, F']        F' < F

Expert count, router and top-k stay, as in SlimMoE (https://arxiv.org/abs/2506.18349), of which this is one stage without the distillation.
A neuron n is as important as what it adds to the layer's output on calibration text, sum over tokens of g |h_n| times ||down[:, n]||.
With `repair`, down is then refitted by least squares (with a ridge) to give, from the kept neurons S, what all of them gave:

    down' = down M[:, S] M[S, S]^-1,   M = the sum of g^2 h h^T over the expert's tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moec.compiler.context import Context
from moec.compiler.errors import MoecError
from moec.compiler.factors import require_no_factors
from moec.compiler.ir import TensorType
from moec.compiler.layers import MoeLayer, need_layers, require_values
from moec.compiler.model import Model
from moec.compiler.weights import each_expert
from moec.passes.slimming.refit import refit
from moec.runtime.errors import unknown

IMPORTANCE = ("output", "activation", "weight")
ALLOCATIONS = ("layer", "model")


@dataclass(frozen=True)
class SlimExperts:
    """Fewer neurons in every expert.

    Args:
        width: neurons to keep: a number, or a share of them (0.75); None leaves the model as it is.
        importance: `output` (g |h| ||down||), `activation` (g |h|) or `weight` (norms of the rows and columns; needs no text).
        allocation: `layer`: every layer keeps the same share; `model`: layers keep more where their neurons matter more.
        multiple: widths are rounded to multiples of this many neurons, which packed kernels read at a time.
        repair: refit the down projections.
        ridge: of the refit, as a share of the mean diagonal.
    """

    width: float | None = None
    importance: str = "output"
    allocation: str = "layer"
    multiple: int = 32
    repair: bool = True
    ridge: float = 0.01

    def __post_init__(self) -> None:
        if self.importance not in IMPORTANCE:
            raise unknown("importance", self.importance, IMPORTANCE)
        if self.allocation not in ALLOCATIONS:
            raise unknown("allocation", self.allocation, ALLOCATIONS)
        if self.width is not None and not (0 < self.width < 1 or (self.width >= 1 and self.width == int(self.width))):
            raise MoecError(f"slim_experts: width {self.width}: expected a number of neurons or a share between 0 and 1")

    def run(self, model: Model, context: Context) -> Model:
        if self.width is None:
            return model
        layers = need_layers(model.graph, "slim_experts")
        require_no_factors(model.graph, "slim_experts")
        scores = [self._scores(model, layer, context) for layer in layers]  # [E, F] each
        widths = self._widths(layers, scores)
        kept = {
            layer.name: score.topk(width, 1).indices.sort(1).values
            for layer, score, width in zip(layers, scores, widths, strict=True)
            if width < layer.width
        }  # [E, F'] each
        chosen = [layer for layer in layers if layer.name in kept]
        for layer in chosen:
            require_values(model, [layer.up, layer.down], "slim_experts")
        down = refit(model, kept, chosen, self.ridge, context) if self.repair and chosen else {}
        for layer in chosen:
            model = _slimmed(model, layer, kept[layer.name], down.get(layer.name))
        context.note("slim_experts", widths=widths)
        return model

    def _scores(self, model: Model, layer: MoeLayer, context: Context) -> Tensor:
        norms = torch.stack([model.load(layer.down, e).norm(dim=0) for e in range(layer.count)])  # [E, F]
        if self.importance == "weight":
            rows = torch.stack([model.load(layer.up, e).view(-1, layer.width, layer.hidden).norm(dim=(0, 2)) for e in range(layer.count)])
            return norms * rows
        hidden = context.statistics(model, "slim_experts").layer(layer.name).weighted_hidden.float()
        return hidden * norms if self.importance == "output" else hidden

    def _widths(self, layers: Sequence[MoeLayer], scores: Sequence[Tensor]) -> list[int]:
        assert self.width is not None
        if self.width >= 1 and any(self.width > layer.width for layer in layers):
            widest = max(layer.width for layer in layers)
            raise MoecError(f"slim_experts: width {self.width:.0f} is more than the experts have ({widest}): give fewer, or a share")
        wanted = [self.width if self.width >= 1 else self.width * layer.width for layer in layers]
        if self.allocation == "model":
            # Layers keep the ranks of their (sorted, normalised) neurons that are above one threshold for all of them.
            profiles = [s.sort(1, descending=True).values.mean(0) for s in scores]
            profiles = [p / p.sum() * layer.width for p, layer in zip(profiles, layers, strict=True)]
            threshold = torch.cat(profiles).sort(descending=True).values[round(sum(wanted)) - 1]
            wanted = [float((p >= threshold).sum()) for p in profiles]
        return [self._rounded(w, layer.width) for w, layer in zip(wanted, layers, strict=True)]

    def _rounded(self, width: float, most: int) -> int:
        return most if width >= most else min(most, max(self.multiple, self.multiple * round(width / self.multiple)))


def _slimmed(model: Model, layer: MoeLayer, kept: Tensor, down: Sequence[Tensor] | None) -> Model:
    """The model with the neurons `kept` [E, F'] of a layer's experts, and their down projections refitted or as they were."""
    parts, width, base = 2 if layer.gated else 1, kept.shape[1], model.weights
    rows = torch.cat([kept + part * layer.width for part in range(parts)], 1)  # [E, parts F']
    edits = {
        layer.up: each_expert(lambda e: base.load(layer.up, e)[rows[e]], layer.count),
        layer.down: each_expert(lambda e: base.load(layer.down, e)[:, kept[e]] if down is None else down[e], layer.count),
    }
    shapes: dict[str, tuple[int, ...]] = {
        layer.up: (layer.count, parts * width, layer.hidden),
        layer.down: (layer.count, layer.hidden, width),
    }
    if bias := (*layer.experts.inputs[5:6], "")[0]:
        edits[bias] = each_expert(lambda e: base.load(bias, e)[rows[e]], layer.count)
        shapes[bias] = (layer.count, parts * width)
    params = [replace(model.graph.params[n], type=TensorType(model.graph.params[n].type.dtype, s)) for n, s in shapes.items()]
    return model.with_params(params, edits)


PASS = SlimExperts
