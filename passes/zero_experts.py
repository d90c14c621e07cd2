"""Experts that cost nothing in the place of removed ones (MoE++, https://arxiv.org/abs/2410.07348), with the router as it was.

    %w, %i = router(%l)                                    %w, %i = router(%l)                       # still chooses among all E
    %y = experts(%x, %i, %w, @up, @down)             ->    %j = aten.index.Tensor(@table, %i)        # E' of E, or outside: skipped
                                                           %y0 = experts(%x, %j, %w, @up', @down')
                                                           %y = %y0 + sum over k of %w[k] (scale[%i[k]] %x + value[%i[k]])

A removed expert is worth nothing (`zero`), its input (`copy`), a constant vector (`constant`) or both with a factor (`mixed`). All
shares of the softmax stay exact. Put the pass after those that rewrite routers or skip, and before those that choose formats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moec.compiler.context import Context
from moec.compiler.errors import MoecError
from moec.compiler.layers import MoeLayer, need_layers, require_values
from moec.compiler.model import Model
from moec.passes.routing.free_experts import KINDS, Fit, Worth, insert_free_experts
from moec.passes.routing.observe import each_block


@dataclass(frozen=True)
class ZeroExperts:
    """Replace experts by free ones.

    Args:
        experts: by the index of a MoE layer, counted from 0, the experts to replace; None chooses by `fraction`.
        fraction: of all experts to replace: those whose replacement changes their layer's result least on calibration text, squared and
            relative to the residual stream. At least one expert of a layer is kept.
        kind: `zero`, `copy`, `constant`, `mixed`.
        per_layer: replace the same number in each layer, rounded down, instead of choosing among all layers.
    """

    experts: Mapping[int, Sequence[int]] | None = None
    fraction: float | None = None
    kind: str = "constant"
    per_layer: bool = True

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise MoecError(f"zero_experts: kind={self.kind!r} is none of {', '.join(KINDS)}")
        if self.experts is not None and self.fraction is not None:
            raise MoecError("zero_experts: give the experts, or a fraction of them, not both")
        if self.fraction is not None and not 0 < self.fraction < 1:
            raise MoecError(f"zero_experts: fraction={self.fraction} must be between 0 and 1")

    def run(self, model: Model, context: Context) -> Model:
        if not self.experts and self.fraction is None:
            return model
        layers = need_layers(model.graph, "zero_experts")
        require_values(model, [name for layer in layers for name in layer.stacks], "zero_experts")
        worth: dict[str, Worth] = {}
        if self.fraction is not None or self.kind in ("constant", "mixed"):
            text = context.need_text("zero_experts")
            each_block(model, text, lambda block: worth.update({block.layer.name: Worth.of(block)}), context.progress, "weigh experts")
        removed = self._chosen(layers) if self.experts else self._cheapest(layers, worth)
        for layer in layers:
            if ids := removed[layer.name]:
                fits = {e: worth[layer.name].fit(e, self.kind) if worth else Fit(float(self.kind == "copy"), None) for e in ids}
                model = insert_free_experts(model, layer, fits)
        context.note("zero_experts", kind=self.kind, removed=removed)
        return model

    def _chosen(self, layers: Sequence[MoeLayer]) -> dict[str, list[int]]:
        """The experts that the option names."""
        chosen = {int(index): sorted({int(e) for e in ids}) for index, ids in (self.experts or {}).items()}
        for index, ids in chosen.items():
            if not 0 <= index < len(layers):
                raise MoecError(f"zero_experts: there is no MoE layer {index}: the model has {len(layers)}, counted from 0")
            count = layers[index].count
            if any(not 0 <= e < count for e in ids) or len(ids) >= count:
                raise MoecError(f"zero_experts: layer {index} has the experts 0 to {count - 1}, and one must be kept; got {ids}")
        return {layer.name: chosen.get(layer.index, []) for layer in layers}

    def _cheapest(self, layers: Sequence[MoeLayer], worth: Mapping[str, Worth]) -> dict[str, list[int]]:
        """The fraction of the experts whose replacement costs least."""
        fraction, removed = float(self.fraction or 0), {layer.name: list[int]() for layer in layers}
        ordered = sorted((worth[layer.name].error(e, self.kind), layer.index, e) for layer in layers for e in range(layer.count))
        left = {layer.index: int(fraction * layer.count) if self.per_layer else layer.count - 1 for layer in layers}
        total = sum(left.values()) if self.per_layer else round(fraction * sum(layer.count for layer in layers))
        for _, index, expert in ordered:
            if total and left[index]:
                removed[layers[index].name].append(expert)
                left[index] -= 1
                total -= 1
        return {name: sorted(ids) for name, ids in removed.items()}


PASS = ZeroExperts
