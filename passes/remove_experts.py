"""Remove experts: those of the least score, or the subset that is missed least.

    %l: f32[B, T, E] = linear(%x, @gate)                              %l: f32[B, T, E'] = linear(%x, @gate)      @gate: rows kept
    %w, %i = router(%l) {top_k=K}                                 ->  %w, %i = router(%l) {top_k=K}
    %y = experts(%x, %i, %w, @up, @down)                              %y = experts(%x, %i, %w, @up, @down)       E' of E experts

Nothing is trained. With a limit on the damage, experts go in steps, and the last step within the limit is the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moec.compiler.context import Context
from moec.compiler.errors import MoecError
from moec.compiler.layers import MoeLayer, keep_experts, need_layers
from moec.compiler.model import Model
from moec.compiler.regroup import mask_experts
from moec.passes.criteria import get_criterion, views
from moec.passes.removal.budgets import (
    BUDGETS,
    at_step,
    check_keep,
    counts_by_importance,
    global_counts,
    importance,
    kept_count,
)
from moec.runtime.errors import unknown

WHAT = "remove_experts"
ROUTERS = ("auto", "slice", "mask")
STEPS = 8
"""Steps on the way to the final number where there is a limit on the damage and no `steps` were given."""


@dataclass(frozen=True)
class RemoveExperts:
    """Which experts to remove; nothing unless `keep` is given.

    Args:
        criterion: a name of `moec.passes.criteria`.
        options: of the criterion.
        keep: experts a layer keeps, as a number (8) or a share (0.5).
        budget: `per_layer`: every layer keeps as many; `global`: the best of all layers together, by score divided by the layer's mean;
            `moe_i2`: layers lose in proportion to 1 / importance, where importance is the damage of removing single experts
            (https://arxiv.org/abs/2411.01016).
        router: `slice`: the router loses the rows of removed experts; `mask`: it keeps them and cannot choose them, so that weights stay
            shares of a softmax over all; `auto`: slice where that makes no difference, else mask.
        steps: remove in so many equal steps, or `layer`: a layer at a step; damage is measured after each.
        max_kl: stop before the damage passes this, in nats a token; by default the limit of the whole compilation.
        tokens: of the sample of inputs for criteria that look at them.
    """

    criterion: str = "reap"
    options: Mapping[str, Any] = field(default_factory=dict)
    keep: float | None = None
    budget: str = "per_layer"
    router: str = "auto"
    steps: int | str | None = None
    max_kl: float | None = None
    tokens: int = 2048

    def __post_init__(self) -> None:
        check_keep(self.keep, WHAT)
        found = get_criterion(self.criterion, self.options)
        for kind, value, choices in (("budget", self.budget, BUDGETS), ("router", self.router, ROUTERS)):
            if value not in choices:
                raise unknown(f"{WHAT} {kind}", str(value), choices)
        if self.budget == "global" and found.score is None:
            raise MoecError(
                f"{WHAT}: budget=global ranks single experts, and {self.criterion} chooses them together; use per_layer or moe_i2"
            )
        if self.steps is not None and self.steps != "layer" and not (isinstance(self.steps, int) and self.steps >= 1):
            raise MoecError(f"{WHAT}: steps is {self.steps!r}; expected a number of steps from 1, or `layer`")
        if (self.max_kl is not None and self.max_kl <= 0) or self.tokens < 1:
            raise MoecError(f"{WHAT}: max_kl is {self.max_kl} and tokens {self.tokens}; expected more than 0")

    def run(self, model: Model, context: Context) -> Model:
        """See `Pass`."""
        if self.keep is None:
            return model
        layers = need_layers(model.graph, WHAT)
        final = [kept_count(layer, self.keep, WHAT) for layer in layers]
        if all(count == layer.count for count, layer in zip(final, layers, strict=True)):
            return model
        criterion = get_criterion(self.criterion, self.options)
        looks = views(model, layers, criterion.needs, context, f"{WHAT} with the criterion {self.criterion}", self.tokens)
        if self.budget == "global":
            final = global_counts([criterion.scores(view) for view in looks], layers, final)
        elif self.budget == "moe_i2":
            final = counts_by_importance(importance(model, context.need_text(WHAT), context.progress), layers, final)

        def shrink(counts: Sequence[int]) -> tuple[Model, dict[str, list[int]]]:
            return self._shrunk(model, {view.layer.name: criterion.keep(view, n) for view, n in zip(looks, counts, strict=True)})

        return self._stepwise(model, layers, final, shrink, context)

    def _shrunk(self, model: Model, keep: Mapping[str, Sequence[int]]) -> tuple[Model, dict[str, list[int]]]:
        """The model with these experts, and which they are where some are removed."""
        changed: dict[str, list[int]] = {}
        for layer in need_layers(model.graph, WHAT):
            if len(kept := list(keep[layer.name])) < layer.count:
                changed[layer.name] = kept
                model = (mask_experts if self._masks(layer) else keep_experts)(model, layer, kept, WHAT)
        return model, changed

    def _masks(self, layer: MoeLayer) -> bool:
        return self.router == "mask" or (self.router == "auto" and not layer.normalized)

    def _stepwise(
        self,
        model: Model,
        layers: Sequence[MoeLayer],
        final: Sequence[int],
        shrink: Callable[[Sequence[int]], tuple[Model, dict[str, list[int]]]],
        context: Context,
    ) -> Model:
        """Remove in steps as long as the damage is within the limit; the damage after each is recorded."""
        limit = self.max_kl if self.max_kl is not None else context.max_kl
        steps = self.steps or (STEPS if limit is not None else 1)
        if steps == "layer":
            plans = [[*final[: at + 1], *(layer.count for layer in layers[at + 1 :])] for at in range(len(layers))]
        else:
            plans = [at_step(layers, final, step / int(steps)) for step in range(1, int(steps) + 1)]
        measured = context.text is not None and context.reference is not None
        if limit is not None and not measured:
            context.damage(model, f"{WHAT} with a limit on the damage")  # says what is missing
        result, kept, trail, stopped = model, dict[str, list[int]](), list[dict[str, Any]](), False
        for counts in plans:
            if list(counts) == [len(kept.get(layer.name, range(layer.count))) for layer in layers]:
                continue
            candidate, chosen = shrink(counts)
            kl = context.damage(candidate, WHAT).kl_divergence if measured else None
            trail.append({"experts": list(counts), "kl_divergence": kl})
            if limit is not None and kl is not None and kl > limit:
                stopped = True
                break
            result, kept = candidate, chosen
        masks = [self._masks(layer) for layer in layers]
        context.note(
            WHAT,
            criterion=self.criterion,
            budget=self.budget,
            kept=kept,
            router=["mask" if m else "slice" for m in masks],
            scores_unchanged=all(m or layer.normalized for m, layer in zip(masks, layers, strict=True)),
            steps=trail,
            limit=limit,
            stopped_by_limit=stopped,
        )
        return result


PASS = RemoveExperts
