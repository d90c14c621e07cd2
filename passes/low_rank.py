"""Low-rank factors in the place of experts' matrices, of the rank that each is worth under a budget of bytes.

    %y = experts(%x, %i, %w, @up, @down)   ->   %y = experts(%x, %i, %w, @up, @down, _, _, @up.left, @up.right, @down.left, @down.right)
    @up: f32[16, 384, 384] as bf16              @up: f32[16, 384, 384] as zero,  @up.left: f32[16, 384, 96] as bf16, ...

The second stage of MoE-I2 (https://arxiv.org/abs/2411.01016), which gives important experts higher ranks. Here an integer program chooses
for damages that an objective measures, as `assign_bits` does: `hessian` is the weighted singular values that are cut off. Factors are the
nearest by the inputs' second moments, made layer by layer. A layer of several ranks becomes a node for each, whose results add up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moec.compiler.allocation import GRAINS, Unit, known_damages, make_units
from moec.compiler.context import Context
from moec.compiler.errors import MoecError
from moec.compiler.factors import with_factors
from moec.compiler.ir import Graph
from moec.compiler.layers import MoeLayer, moe_layers, need_layers
from moec.compiler.model import Model
from moec.compiler.plan import parse_size
from moec.compiler.quantizers import get_quantizer
from moec.compiler.sensitivity import get_objective
from moec.compiler.solver import choose
from moec.compiler.split_experts import split_experts
from moec.compiler.weights import Edit, each_expert
from moec.passes.factoring.fit import Fitted, Ranks, fit
from moec.passes.factoring.ranks import RankProblem, plain_format, rank_of, whole_bytes
from moec.runtime.errors import unknown

WHAT = "low_rank"


@dataclass(frozen=True)
class LowRank:
    """Factors of experts' projections under a budget; without a budget nothing changes.

    Args:
        budget: what the experts' projections may take: a share of their bytes now (0.75), or a size (`12MiB`).
        shares: what may be chosen, as shares of a matrix's numbers; 1 leaves it whole.
        units: `projection`, or `expert` (its projections have one share): a layer becomes a node for each combination that occurs, so that
            there are fewer nodes, and more damage.
        multiple: ranks are multiples of this, which packed kernels read at a time.
        objective, objective_options: what damage is, as in `assign_bits`.
        refit: fit down projections to what the factors of the up projections leave of their inputs.
        ridge: of the refit, as a share of the mean square of the inputs.
    """

    budget: float | str | None = None
    shares: Sequence[float] = (1, 0.75, 0.5, 0.25)
    units: str = "projection"
    multiple: int = 16
    objective: str = "gauss_newton"
    objective_options: Mapping[str, Any] = field(default_factory=dict)
    refit: bool = True
    ridge: float = 0.01

    def __post_init__(self) -> None:
        get_objective(self.objective, self.objective_options)
        if self.units not in GRAINS:
            raise unknown(f"units of {WHAT}", self.units, GRAINS)
        if isinstance(self.budget, str):
            parse_size(self.budget)
        elif self.budget is not None and not 0 < self.budget < 1:
            raise MoecError(
                f"{WHAT}: budget {self.budget}: expected a share of the experts' bytes between 0 and 1, or a size such as 12MiB"
            )
        if not self.shares or len(set(self.shares)) < len(self.shares) or not all(0 < share <= 1 for share in self.shares):
            raise MoecError(f"{WHAT}: shares {list(self.shares)}: expected different numbers above 0 and up to 1, such as [1, 0.5]")
        if self.multiple < 1 or self.ridge < 0:
            raise MoecError(f"{WHAT}: multiple={self.multiple} must be at least 1 and ridge={self.ridge} at least 0")

    def run(self, model: Model, context: Context) -> Model:
        if self.budget is None:
            return model
        layers = need_layers(model.graph, WHAT)
        units = make_units(model, self.units, ["experts"], WHAT)
        shares = tuple(map(str, sorted(self.shares, reverse=True)))
        problem = RankProblem(model, context, tuple(units), shares, get_quantizer("rtn"), multiple=self.multiple)
        names = [name for layer in layers for name in (layer.up, layer.down)]
        total, least = whole_bytes(model, names), int(problem.sizes.min(1).sum())
        budget = parse_size(self.budget) if isinstance(self.budget, str) else int(self.budget * total)
        if budget < least:
            raise MoecError(
                f"{WHAT}: budget={self.budget} is {budget:,} bytes; the smallest of the shares {', '.join(shares)} need {least:,} bytes "
                f"of {total:,}: raise the budget or add smaller shares"
            )
        context.need_text(WHAT)
        damages = known_damages(get_objective(self.objective, self.objective_options).damages(problem), problem)
        found = choose(damages.numpy(), problem.sizes, budget)
        ranks = self._ranks(model, units, [problem.shares[option] for option in found.options])
        context.note(
            WHAT, objective=self.objective, budget_bytes=budget, bytes=found.size, whole_bytes=total, damage=found.damage,
            shares=dict(Counter(shares[option] for option in found.options)),
            units={unit.name: shares[option] for unit, option in zip(units, found.options, strict=True)},
        )  # fmt: skip
        changed = [layer for layer in layers if any(name in (layer.up, layer.down) for name, _ in ranks)]
        fitted = fit(model, changed, ranks, self.ridge if self.refit else None, context)
        for layer in changed:
            model = with_ranks(model, layer, ranks, fitted)
        return model

    def _ranks(self, model: Model, units: Sequence[Unit], shares: Sequence[float]) -> dict[tuple[str, int], int]:
        ranks: dict[tuple[str, int], int] = {}
        for unit, share in zip(units, shares, strict=True):
            for name in unit.members:
                assert unit.expert is not None
                n, k = (int(d) for d in model.graph.params[name].type.shape[1:])
                if (rank := rank_of(n, k, share, self.multiple)) is not None:
                    ranks[name, unit.expert] = rank
        return ranks


def with_ranks(model: Model, layer: MoeLayer, ranks: Ranks, fitted: Fitted) -> Model:
    """The model with the factors of a layer, as a node for each combination of ranks."""
    classes: dict[tuple[int | None, int | None], list[int]] = {}
    for expert in range(layer.count):
        classes.setdefault((ranks.get((layer.up, expert)), ranks.get((layer.down, expert))), []).append(expert)
    parts = [layer.name]
    if len(classes) > 1:
        parts = [f"{layer.name}.part{index}" for index in range(len(classes))]
        model = split_experts(model, layer.experts, list(classes.values()))
    for name, (pair, members) in zip(parts, classes.items(), strict=True):
        model = _factored(model, name, (layer.up, layer.down), pair, members, fitted)
    return model


def _factored(
    model: Model, name: str, old: tuple[str, str], ranks: tuple[int | None, int | None], members: Sequence[int], fitted: Fitted
) -> Model:
    """The model with one node's projections replaced: by their factors where they have a rank, else by what they were refitted to."""
    node = _named(model.graph, name)
    wanted = {now: rank for now, rank in zip((node.up, node.down), ranks, strict=True) if rank is not None}
    graph = with_factors(model.graph, node, wanted, {now: plain_format(model, now) for now in wanted})
    pairs = _named(graph, name).factors
    edits: dict[str, Edit] = {}

    def value(source: str, part: int, member: int) -> Tensor:
        return fitted[source, members[member]][part]

    def zeros(shape: Sequence[int], _: int) -> Tensor:
        return torch.zeros(shape)

    for source, now in zip(old, (node.up, node.down), strict=True):
        shape = [int(d) for d in graph.params[now].type.shape[1:]]
        if now in wanted:
            edits[now] = each_expert(partial(zeros, shape), len(members))
            edits |= {factor: each_expert(partial(value, source, part), len(members)) for part, factor in enumerate(pairs[now])}
        elif any((source, member) in fitted for member in members):
            edits[now] = each_expert(partial(_refitted, model, now, source, members, fitted), len(members))
    graph = graph.with_params([replace(graph.params[now], format="zero") for now in wanted])
    return model.edited(graph, edits)


def _refitted(model: Model, now: str, source: str, members: Sequence[int], fitted: Fitted, member: int) -> Tensor:
    found = fitted.get((source, members[member]))
    return model.load(now, member) if found is None else found[0].to(torch.get_default_device())


def _named(graph: Graph, name: str) -> MoeLayer:
    return next(layer for layer in moe_layers(graph) if layer.name == name)


PASS = LowRank
