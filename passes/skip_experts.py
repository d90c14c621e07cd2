"""Fewer experts for tokens that need fewer, by a rule over the routing weights.

    %w, %i = router(%l)                           %w, %i = router(%l)
    %y = experts(%x, %i, %w, @up, @down)     ->   %sw, %si = skip(%w, %i) {experts=16, ratio=0.21}
                                                  %y = experts(%x, %si, %sw, @up, @down)

Thresholds are those of a fraction of activations on calibration text: ODP of MC-MoE (https://arxiv.org/abs/2410.06270) is
`{rule: ratio}`, whose threshold is the layer's median, with `protect: 0.02`; a target generalises it.

Protection differs from the paper's. There the tokens that later tokens look at most (the column sums of the attention map) keep all their
experts, which needs the tokens after; with a cache of keys and values a token's experts run before those are known, and the paper's own
code protects nothing in decoding. Here a token is protected when ||t||_1 of its residual stream is above a quantile of calibration text:
the other factor of the paper's importance, and the one that is known in time. Tokens that attention collects at have by far the largest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moec.compiler.context import Context
from moec.compiler.errors import MoecError
from moec.compiler.layers import MoeLayer, need_layers
from moec.compiler.model import Model
from moec.passes.routing.allocate import Fractions, allocate, within_limit
from moec.passes.routing.insert import insert_skip, per_layer
from moec.passes.routing.protect import insert_protected_skip, norm_thresholds
from moec.passes.routing.trace import kept_fraction, skipped_on_text, trace_of
from moec.passes.rules import get_rule


@dataclass(frozen=True)
class SkipExperts:
    """Skip slots of small weight.

    Args:
        rule: `ratio`, `top_p` or `naee` (`moec.passes.rules`); None changes nothing.
        target: the fraction of all expert activations to skip, below 1. None takes what the rule was published with, in each layer.
        threshold: the rule's threshold instead of a target (`ratio`: a share of the first weight; `top_p`: of the sum), one for all layers
            or a list. Needs no calibration text.
        per_layer: give each layer its part of the target by the damage it does alone (two measurements a layer); else all the same.
        protect: the fraction of tokens that keep all experts, by the norm of their residual stream.
        normalize: scale the weights that are left, so that their sum stays what it was. That enlarges what the experts that run add, and
            on models whose weights sum to 1 it did several times the damage of leaving the weights as they are.
    """

    rule: str | None = None
    target: float | None = None
    threshold: float | Sequence[float] | None = None
    per_layer: bool = True
    protect: float = 0.0
    normalize: bool = False

    def __post_init__(self) -> None:
        if self.rule is not None:
            get_rule(self.rule)
        if self.target is not None and not 0 < self.target < 1:
            raise MoecError(f"skip_experts: target={self.target} must be a fraction of the activations, between 0 and 1")
        if not 0 <= self.protect < 1:
            raise MoecError(f"skip_experts: protect={self.protect} must be a fraction of the tokens, from 0 to below 1")
        if self.target is not None and (self.threshold is not None or self.rule == "naee"):
            raise MoecError("skip_experts: give a target, or a rule or threshold that decides how much is skipped, not both")
        if self.threshold is not None:
            if self.rule not in ("ratio", "top_p"):
                raise MoecError("skip_experts: a threshold needs the rule ratio or top_p")
            for value in self.threshold if isinstance(self.threshold, (list, tuple)) else (self.threshold,):
                if not 0 < float(value) <= 1:
                    raise MoecError(f"skip_experts: threshold={value} must be above 0 and at most 1")

    def run(self, model: Model, context: Context) -> Model:
        if self.rule is None:
            return model
        layers = [layer for layer in need_layers(model.graph, "skip_experts") if layer.top_k > 1]
        if not layers:
            raise MoecError("skip_experts: every layer chooses one expert a token, and that one always runs")
        protect = norm_thresholds(model, layers, self.protect, context) if self.protect else {}
        if self.threshold is not None:
            values = per_layer(self.threshold, layers, "skip_experts: threshold")
            attrs = {layer.name: {str(self.rule): value} for layer, value in zip(layers, values, strict=True)}
            return self._rewritten(model, layers, attrs, protect)
        statistics = context.statistics(model, f"skip_experts with the rule {self.rule}")
        traces = {layer.name: trace_of(statistics.layer(layer.name), layer) for layer in layers}
        rule = get_rule(self.rule)

        def rewrite(fractions: Mapping[str, float | None]) -> Model:
            attrs = {name: rule(traces[name], f) for name, f in fractions.items() if f is None or f > 0}
            return self._rewritten(model, layers, attrs, protect)

        if self.target is None:
            result, fractions = rewrite({layer.name: None for layer in layers}), None
        else:
            result, fractions = self._to_target(model, layers, self.target, rewrite, context)
        thresholds = {n.name: {k: v for k, v in n.attrs.items() if k in ("ratio", "top_p")} for n in result.graph.nodes if n.op == "skip"}
        context.note(
            "skip_experts", rule=self.rule, target=self.target, fractions=fractions, thresholds=thresholds,
            skipped=self._skipped(result, layers, traces, context),
        )  # fmt: skip
        return result

    def _skipped(self, result: Model, layers: Sequence[MoeLayer], traces: Mapping[str, Tensor], context: Context) -> dict[str, float]:
        """The fraction of activations that a layer skips, by layer."""
        if self.protect:  # how many tokens are protected, the trace of routing weights does not say
            found = skipped_on_text(result, layers, context.need_text("skip_experts with protect"))
        else:
            found = {name: 1 - kept_fraction(result.graph, name, trace) for name, trace in traces.items()}
        return {name: round(fraction, 4) for name, fraction in found.items()}

    def _to_target(
        self, model: Model, layers: Sequence[MoeLayer], target: float, rewrite: Any, context: Context
    ) -> tuple[Model, Fractions | None]:
        """The model that skips the target, or as much of it as the limit on damage allows."""
        shape = {layer.name: target for layer in layers}
        if self.per_layer:
            shape = allocate(model, layers, target, rewrite, context, "skip_experts")
        most = {layer.name: (layer.top_k - 1) / layer.top_k for layer in layers}

        def scaled(goal: float) -> Fractions:
            return {name: min(f * goal / target, most[name]) for name, f in shape.items()}

        result, reached = within_limit(lambda goal: rewrite(scaled(goal)), target, context, "skip_experts")
        return result, scaled(reached)

    def _rewritten(
        self, model: Model, layers: Sequence[MoeLayer], attrs: Mapping[str, Mapping[str, Any]], protect: Mapping[str, float]
    ) -> Model:
        """The model in which the layers that `attrs` names skip."""
        graph = model.graph
        for layer in layers:
            if attrs.get(layer.name):
                if layer.name in protect:
                    graph = insert_protected_skip(graph, layer, attrs[layer.name], protect[layer.name], normalize=self.normalize)
                else:
                    graph = insert_skip(graph, layer, {**attrs[layer.name], "normalize": self.normalize})
        return Model(graph, model.weights)


PASS = SkipExperts
