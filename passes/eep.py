"""EEP: search for the experts to keep, and for weighted sums of experts, by evolution (https://arxiv.org/abs/2407.00945).

    %l: f32[B, T, E] = linear(%x, @gate)                          %l: f32[B, T, E] = linear(%x, @gate)
    %w, %i = router(%l) {top_k=K}                                 %s: f32[B, T, E] = aten._softmax.default(%l)
    %y = experts(%x, %i, %w, @up, @down)                      ->  %m: f32[B, T, E'] = linear(%s, @map)
                                                                  %w, %i = router(%m) {top_k=K, score="identity"}
                                                                  %y = experts(%x, %i, %w, @up', @down')

Two matrices [E', E] a group of layers say what the new experts and their scores are. First every row is one expert (pruning: the
router loses rows, or is masked where that would change weights); then both become any numbers (merging). Both phases search on a
part of the calibration text, or on questions and answers, which the damage is not measured on.

Two additions are ours, and off unless asked for: `climb` looks for the experts to keep by single exchanges before the evolution begins, and
can give layers different numbers of them; `refine` moves the matrices down the gradient of the loss after it has ended, with which the
method is no longer one without gradients. See `moec.passes.evolution.climb` and `refine`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moec.compiler.candidates import Choice
from moec.compiler.context import Context
from moec.compiler.errors import MoecError
from moec.compiler.layers import MoeLayer, keep_experts, need_layers
from moec.compiler.model import Model
from moec.compiler.regroup import map_experts, mask_experts, with_top_k
from moec.passes.criteria import best, get_criterion, views
from moec.passes.evolution.climb import Climb
from moec.passes.evolution.fitness import FITNESS
from moec.passes.evolution.genes import Candidate, Rates, one_hot, random_candidate
from moec.passes.evolution.measure import Measure, on_task, on_text
from moec.passes.evolution.refine import Descent, Refine
from moec.passes.evolution.search import Plan, Search
from moec.passes.removal.budgets import check_keep, global_counts, kept_count
from moec.runtime.errors import unknown

WHAT = "eep"
PHASES = ("prune", "merge", "both")
BUDGETS = ("per_layer", "global")
MEASURED_BY = ("groups", "top_k", "fitness", "task", "questions", "tokens", "window")
"""What the fitness of a candidate depends on, of the options."""
LEAST = {"groups": 0, "questions": 1, "tokens": 1, "window": 1, "initial": 1, "prune_steps": 0, "merge_steps": 0, "climb": 0}


@dataclass(frozen=True)
class Eep:
    """What to search for; nothing unless `keep` or `top_k` is given.

    Args:
        keep: experts a layer keeps, as a number (8) or a share (0.5); all unless given.
        top_k: experts a token; as many as before unless given, or all that are kept where those are fewer.
        phase: `prune` keeps experts as they are, `merge` mixes them, `both` does one after the other.
        groups: layers are cut by depth into so many groups that share matrices; 0 gives each layer its own.
        fitness: `kl`, `perplexity` or `task` (see `moec.passes.evolution.fitness`).
        task: a JSONL file of questions, for the fitness `task`.
        questions: so many of them.
        tokens, window: of calibration text for the other two, and how many of them follow each other at most.
        initial: candidates at first, random ones and those of `start`.
        start: criteria of `remove_experts` whose choices are among the first candidates (a group takes the experts with the largest
            scores summed over its layers, each layer's as shares of its mean; criteria that choose experts together need groups=0).
        prune_steps, merge_steps: candidates of each phase.
        climb: candidates of a climb by single exchanges from the best of `start`; the evolution then begins with what it found.
        budget: `per_layer`, or `global`: the climb may also give one group's place for an expert to another one, with the sum unchanged.
        refine: how to descend in the end, see `moec.passes.evolution.refine.Refine`: {steps: 300}, and rate and tokens.
        rates: of mutation and crossover, see `moec.passes.evolution.genes.Rates`.
    """

    keep: float | None = None
    top_k: int | None = None
    phase: str = "both"
    groups: int = 4
    fitness: str = "kl"
    task: str | None = None
    questions: int = 48
    tokens: int = 2048
    window: int = 128
    initial: int = 30
    start: Sequence[str] = ()
    prune_steps: int = 70
    merge_steps: int = 300
    climb: int = 0
    budget: str = "per_layer"
    refine: dict[str, float] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_keep(self.keep, WHAT)
        self._check_names()
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                raise MoecError(f"{WHAT}: {name} is {getattr(self, name)}; expected at least {least}")
        if self.top_k is not None and self.top_k < 1:
            raise MoecError(f"{WHAT}: top_k is {self.top_k}; expected at least 1")
        if (self.fitness == "task") != (self.task is not None):
            raise MoecError(f"{WHAT}: fitness=task needs task=FILE of questions and answers, and no other fitness takes one")
        if self._refine().steps and self.phase == "prune":
            raise MoecError(f"{WHAT}: refine mixes experts, which phase=prune keeps as they are: use phase=both or merge")
        if self.budget == "global" and not self.climb:
            raise MoecError(f"{WHAT}: budget=global is for the climb alone: say how many candidates it may measure, as climb=600")

    def _check_names(self) -> None:
        """That everything which has a name is something."""
        for kind, value, choices in (("phase", self.phase, PHASES), ("fitness", self.fitness, FITNESS), ("budget", self.budget, BUDGETS)):
            if value not in choices:
                raise unknown(f"{WHAT} {kind}", value, choices)
        for option, names in ((self.rates, Rates.__dataclass_fields__), (self.refine, Refine.__dataclass_fields__)):
            for name in option:
                if name not in names:
                    raise unknown(f"{'rate' if option is self.rates else 'option of refine'} of {WHAT}", name, names)
        for name in self.start:
            if get_criterion(name).score is None and self.groups != 0:
                raise MoecError(f"{WHAT}: start={name} scores no single experts, so that layers cannot share its choice: use groups=0")

    def run(self, model: Model, context: Context) -> Model:
        """See `Pass`."""
        if self.keep is None and self.top_k is None:
            return model
        layers = need_layers(model.graph, WHAT)
        groups = self._groups(layers)
        measure = self._measure(model, context)
        sizes = [(kept_count(g[0], 1.0 if self.keep is None else self.keep, WHAT, least=1), g[0].count) for g in groups]
        for group, (kept, _) in zip(groups, sizes, strict=True):
            if self.top_k is not None and self.top_k > kept:
                raise MoecError(f"{WHAT}: top_k is {self.top_k}, and %{group[0].name} would have {kept} experts")
        start = [candidate for name in self.start for candidate in self._starts(model, groups, sizes, name, context)]
        if all(kept == count for kept, count in sizes):
            every = tuple(one_hot(range(count), count) for _, count in sizes)
            start.insert(0, Candidate(every, every))
        winner, trail, losses = self._found(groups, sizes, start, measure, context, model)
        result = self._applied(model, groups, winner)
        measured = context.text is not None and context.reference is not None
        context.note(
            WHAT,
            phase=self.phase,
            fitness=self.fitness,
            searched_on=measure.words,
            evaluations=len(trail),
            fitness_by_evaluation=[round(v, 4) for v in trail],
            refine_losses=[round(v, 5) for v in losses] or None,
            experts=[row.argmax(1).tolist() for row in winner.merge] if winner.one_hot else None,
            merge=None if winner.one_hot else [m.tolist() for m in winner.merge],
            route=None if winner.one_hot else [m.tolist() for m in winner.route],
            kl_divergence=context.damage(result, WHAT).kl_divergence if measured else None,
        )
        return result

    def _groups(self, layers: Sequence[MoeLayer]) -> list[list[MoeLayer]]:
        count = min(self.groups or len(layers), len(layers))
        ends = [round(i * len(layers) / count) for i in range(count + 1)]
        groups = [list(layers[a:b]) for a, b in pairwise(ends)]
        for group in groups:
            if len({layer.count for layer in group}) > 1:
                raise MoecError(
                    f"{WHAT}: layers of one group have {[m.count for m in group]} experts; groups=0 gives each its own matrices"
                )
        return groups

    def _top_k(self, layer: MoeLayer, kept: int) -> int:
        return min(self.top_k or layer.top_k, kept)

    def _measure(self, model: Model, context: Context) -> Measure:
        text = context.need_text(WHAT)
        if self.task is not None:
            return on_task(model, self.task, text, self.questions, WHAT)
        return on_text(model, self.fitness, text.sample(self.tokens, self.window).ids, text.ids, WHAT)

    def _kept_in(self, model: Model, measure: Measure, context: Context, options: Sequence[str], kind: str) -> tuple[Path | None, str]:
        """Where to keep a part of the search, and what tells it from any other: everything that it depends on, these options of ours."""
        if context.work is None:
            return None, ""
        ours = {name: value for name, value in asdict(self).items() if name in options}
        learned = hashlib.sha256(measure.pool.cpu().numpy().tobytes()).hexdigest()
        facts = (model.digest(), ours, measure.words, learned, context.seed, context.need_text(WHAT).fingerprint())
        identity = hashlib.sha256(repr(facts).encode()).hexdigest()
        folder = Path(context.work)
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"eep-{identity[:16]}{kind}", identity

    def _refine(self) -> Refine:
        whole = {"steps", "tokens"}
        return Refine(**{k: int(v) if k in whole else float(v) for k, v in self.refine.items()})  # type: ignore[arg-type]

    def _found(
        self,
        groups: Sequence[Sequence[MoeLayer]],
        sizes: Sequence[tuple[int, int]],
        start: Sequence[Candidate],
        measure: Measure,
        context: Context,
        model: Model,
    ) -> tuple[Candidate, list[float], list[float]]:
        """The best candidate, the best fitness after each evaluation, and the losses of the descent."""

        def worth(candidate: Candidate) -> float:
            return measure.worth(self._choices(groups, candidate))

        trail: list[float] = []
        if self.climb:
            layers = [len(g) for g in groups] if self.budget == "global" else None
            kept = self._kept_in(model, measure, context, MEASURED_BY, "-climb.json")
            climb = Climb([count for _, count in sizes], worth, self.climb, layers, *kept)
            found = climb.run(start or [random_candidate(sizes, np.random.default_rng(context.seed))], context.progress)
            trail, start, sizes = climb.trail, [found], [(rows.shape[0], rows.shape[1]) for rows in found.merge]
        plan = Plan(self.initial, self.prune_steps if self.phase != "merge" else 0, self.merge_steps if self.phase != "prune" else 0)
        kept = self._kept_in(model, measure, context, [n for n in asdict(self) if n != "refine"], ".safetensors")
        search = Search(sizes, worth, plan, Rates(**self.rates), context.seed, start, *kept)
        winner, more = search.run(context.progress)
        trail += more
        if not (options := self._refine()).steps:
            return winner, trail, []

        def loss(merge: Sequence[Tensor], route: Sequence[Tensor], rows: Tensor) -> Tensor:
            parts = zip(groups, merge, route, strict=True)
            return measure.loss([Choice(m, r, self._top_k(layer, len(m))) for group, m, r in parts for layer in group], rows)

        size = max(1, options.tokens // measure.pool.shape[1])
        kept = self._kept_in(model, measure, context, list(asdict(self)), "-refine.safetensors")
        descent = Descent(loss, len(measure.pool), size, worth, options, context.seed, *kept)
        winner = descent.run(winner, context.progress)
        return winner, [*trail, winner.fitness], descent.losses

    def _choices(self, groups: Sequence[Sequence[MoeLayer]], candidate: Candidate) -> list[Choice]:
        found = []
        for group, merge, route in zip(groups, candidate.merge, candidate.route, strict=True):
            first = torch.from_numpy(merge).to(torch.get_default_device())
            second = first if merge is route else torch.from_numpy(route).to(first.device)
            found += [Choice(first, second, self._top_k(layer, len(merge))) for layer in group]
        return found

    def _starts(
        self, model: Model, groups: Sequence[Sequence[MoeLayer]], sizes: Sequence[tuple[int, int]], name: str, context: Context
    ) -> list[Candidate]:
        """What a criterion chooses in each group, and in all of them together where places may go from one to another."""
        criterion = get_criterion(name)
        looks = {
            v.layer.name: v for v in views(model, [m for g in groups for m in g], criterion.needs, context, f"{WHAT} with start={name}")
        }
        if criterion.score is None:
            kept = [criterion.keep(looks[group[0].name], keep) for group, (keep, _) in zip(groups, sizes, strict=True)]
            return [_keeping(kept, sizes)]
        scores = [torch.stack([_shares(criterion.scores(looks[layer.name])) for layer in group]).sum(0) for group in groups]
        counts = [keep for keep, _ in sizes]
        several = [counts]
        if self.budget == "global" and len({len(group) for group in groups}) == 1:
            several.append(global_counts(scores, [group[0] for group in groups], counts))
        chosen = [[best(s, count) for s, count in zip(scores, each, strict=True)] for each in several if sum(each) == sum(counts)]
        return [_keeping(kept, sizes) for kept in chosen]

    def _applied(self, model: Model, groups: Sequence[Sequence[MoeLayer]], winner: Candidate) -> Model:
        """The model with the experts of a candidate."""
        choices = iter(self._choices(groups, winner))
        for name in [layer.name for group in groups for layer in group]:
            choice = next(choices)
            (layer,) = (m for m in need_layers(model.graph, WHAT) if m.name == name)
            if choice.top_k is not None and choice.top_k != layer.top_k:
                model = Model(with_top_k(model.graph, layer, choice.top_k, WHAT), model.weights)
                (layer,) = (m for m in need_layers(model.graph, WHAT) if m.name == name)
            if (kept := choice.kept) is None or len(set(kept)) < len(kept):
                model = map_experts(model, layer, choice.merge, choice.route, WHAT)
            elif kept != list(range(layer.count)):
                model = (keep_experts if layer.normalized else mask_experts)(model, layer, kept, WHAT)
        return model


def _shares(scores: Tensor) -> Tensor:
    """Scores as shares of their mean."""
    return scores / scores.mean().clamp_min(1e-30)


def _keeping(kept: Sequence[Sequence[int]], sizes: Sequence[tuple[int, int]]) -> Candidate:
    """The candidate with these experts of each group."""
    rows = tuple(one_hot(experts, count) for experts, (_, count) in zip(kept, sizes, strict=True))
    return Candidate(rows, rows)


PASS = Eep
