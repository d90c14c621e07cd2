"""Merge experts that are alike into their average; what chose a member now chooses the merged expert.

    %w, %i = router(%l) {top_k=K}              %w, %i0 = router(%l) {top_k=K}
    %y = experts(%x, %i, %w, @up, @down)   ->  %i = aten.index.Tensor(@table, %i0) {indices=1}
                                               %y = experts(%x, %i, %w, @up', @down')                    E' of E experts

The router keeps all its rows, so that a token can choose a merged expert twice, and its weights add up. Where the members were the same
function, the model still computes what it did.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from moec.compiler.clustering import assign
from moec.compiler.context import Context
from moec.compiler.errors import MoecError
from moec.compiler.factors import folded
from moec.compiler.layers import MoeLayer, need_layers, require_no_table, require_values
from moec.compiler.model import Model
from moec.compiler.regroup import router_rows, tie_experts
from moec.compiler.weights import Edit
from moec.passes.criteria import View, views
from moec.passes.merging import get_method
from moec.passes.removal.budgets import check_keep, global_counts, kept_count
from moec.runtime.errors import unknown

WHAT = "merge_experts"
BUDGETS = ("per_layer", "global")


@dataclass(frozen=True)
class MergeExperts:
    """Which experts to merge; nothing unless `keep` is given.

    Args:
        method: a name of `moec.passes.merging`.
        keep: experts that each layer keeps, as a number (8) or a share (0.5).
        budget: `per_layer`: every layer keeps as many; `global`: a layer keeps as many as it has among the most used experts of all
            layers, and what its router chooses for a token at least.
        tokens: of the sample of inputs for methods that look at them.
    """

    method: str = "hc_smoe"
    keep: float | None = None
    budget: str = "per_layer"
    tokens: int = 2048

    def __post_init__(self) -> None:
        check_keep(self.keep, WHAT)
        get_method(self.method)
        if self.budget not in BUDGETS:
            raise unknown(f"{WHAT} budget", self.budget, BUDGETS)
        if self.tokens < 1:
            raise MoecError(f"{WHAT}: tokens is {self.tokens}; expected at least 1")

    def run(self, model: Model, context: Context) -> Model:
        """See `Pass`."""
        if self.keep is None:
            return model
        model = folded(model)
        method, layers = get_method(self.method), need_layers(model.graph, WHAT)
        counts = [kept_count(layer, self.keep, WHAT, least=1) for layer in layers]
        for layer in layers:
            require_no_table(layer, WHAT)
            require_values(model, layer.stacks, WHAT)
        if all(count == layer.count for count, layer in zip(counts, layers, strict=True)):
            return model
        looks = views(model, layers, ("statistics", *method.needs), context, f"{WHAT} with the method {self.method}", self.tokens)
        if self.budget == "global":
            counts = global_counts([view.statistics.count.double() for view in looks], layers, counts)
        source, merged = model, dict[str, list[list[int]]]()
        for view, count in zip(looks, counts, strict=True):
            if count < view.layer.count:
                groups = method.group(view, count)
                merged[view.layer.name] = groups
                model = _merged(source, model, view, groups, method.align)
        measured = context.text is not None and context.reference is not None
        kl = context.damage(model, WHAT).kl_divergence if measured else None
        context.note(WHAT, method=self.method, budget=self.budget, groups=merged, kl_divergence=kl)
        return model


def _merged(source: Model, model: Model, view: View, groups: Sequence[Sequence[int]], align: bool) -> Model:
    """The model with the experts of a layer merged by use.

    Args:
        source: the values of the old experts.
        model: the graph so far.
    """
    (layer,) = (m for m in need_layers(model.graph, WHAT) if m.name == view.layer.name)
    use = view.statistics.count.double()
    shares = [use[list(g)] / use[list(g)].sum() if use[list(g)].sum() > 0 else torch.full((len(g),), 1 / len(g)) for g in groups]

    @cache
    def orders(group: int) -> list[Tensor | None]:
        return [_order(source, layer, groups[group][0], e) if align and e != groups[group][0] else None for e in groups[group]]

    def edit(name: str, axes: str) -> Edit:
        def one(group: int) -> Tensor:
            members = groups[group]
            if len(members) == 1:
                return source.load(name, members[0])
            values = [source.load(name, e) for e in members]
            ordered = [v if o is None else _reordered(v, o, axes, layer.gated) for v, o in zip(values, orders(group), strict=True)]
            parts = zip(shares[group].float().tolist(), ordered, strict=True)
            return torch.stack([share * value for share, value in parts]).sum(0)

        return lambda at: torch.stack([one(g) for g in range(len(groups))]) if at is None else one(at)

    names = {layer.up: "rows", layer.down: "columns"}
    names |= {name: "rows" if name == layer.experts.inputs[5] else "none" for name in layer.biases}
    table = torch.empty(router_rows(model.graph, layer), dtype=torch.int64)
    for at, group in enumerate(groups):
        table[list(group)] = at
    return tie_experts(model, layer, table, {name: edit(name, axes) for name, axes in names.items()})


def _order(model: Model, layer: MoeLayer, leader: int, member: int) -> Tensor:
    """The neuron of `member` that stands for each neuron of `leader`: int64 [F].

    The sum of the inner products of their rows of the up (and gate) projection and their columns of the down projection is the largest.
    """

    def rows(expert: int) -> Tensor:
        up = model.load(layer.up, expert)
        halves = up.chunk(2) if layer.gated else (up,)
        return torch.cat([*halves, model.load(layer.down, expert).T], 1)  # [F, 3D]

    return torch.from_numpy(assign((rows(leader) @ rows(member).T).cpu().numpy()))


def _reordered(value: Tensor, order: Tensor, axes: str, gated: bool) -> Tensor:
    if axes == "columns":
        return value[:, order]
    if axes == "none":
        return value
    return torch.cat([half[order] for half in value.chunk(2)]) if gated else value[order]


PASS = MergeExperts
