"""EEP: search for the experts to keep, and for weighted sums of experts, by evolution without gradients (https://arxiv.org/abs/2407.00945).

    %l: f32[B, T, E] = linear(%x, @gate)                          %l: f32[B, T, E] = linear(%x, @gate)
    %w, %i = router(%l) {top_k=K}                                 %s: f32[B, T, E] = aten._softmax.default(%l)
    %y = experts(%x, %i, %w, @up, @down)                      ->  %m: f32[B, T, E'] = linear(%s, @map)
                                                                  %w, %i = router(%m) {top_k=K, score="identity"}
                                                                  %y = experts(%x, %i, %w, @up', @down')

Two matrices [E', E] a group of layers say what the new experts and their scores are. First every row is one expert (pruning: the
router loses rows, or is masked where that would change weights); then both become any numbers (merging). Both phases search on a
part of the calibration text, or on questions and answers, which the damage is not measured on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path

import torch

from moec.compiler.candidates import Candidates, Choice
from moec.compiler.context import Context
from moec.compiler.errors import MoecError
from moec.compiler.layers import MoeLayer, keep_experts, need_layers
from moec.compiler.model import Model
from moec.compiler.regroup import map_experts, mask_experts, with_top_k
from moec.passes.criteria import best, get_criterion, views
from moec.passes.evolution import fitness
from moec.passes.evolution.genes import Candidate, Rates, one_hot
from moec.passes.evolution.search import Plan, Search
from moec.passes.removal.budgets import check_keep, kept_count
from moec.runtime.errors import unknown

WHAT = "eep"
PHASES = ("prune", "merge", "both")


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
        tokens: of calibration text for the other two.
        initial: candidates at first, random ones and those of `start`.
        start: criteria of `remove_experts` whose choices are among the first candidates (a group takes the experts with the largest
            scores summed over its layers, each layer's as shares of its mean; criteria that choose experts together need groups=0).
        prune_steps, merge_steps: candidates of each phase.
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
    initial: int = 30
    start: Sequence[str] = ()
    prune_steps: int = 70
    merge_steps: int = 300
    rates: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_keep(self.keep, WHAT)
        for kind, value, choices in (("phase", self.phase, PHASES), ("fitness", self.fitness, fitness.FITNESS)):
            if value not in choices:
                raise unknown(f"{WHAT} {kind}", value, choices)
        for name, least in (("groups", 0), ("questions", 1), ("tokens", 1), ("initial", 1), ("prune_steps", 0), ("merge_steps", 0)):
            if getattr(self, name) < least:
                raise MoecError(f"{WHAT}: {name} is {getattr(self, name)}; expected at least {least}")
        if self.top_k is not None and self.top_k < 1:
            raise MoecError(f"{WHAT}: top_k is {self.top_k}; expected at least 1")
        if (self.fitness == "task") != (self.task is not None):
            raise MoecError(f"{WHAT}: fitness=task needs task=FILE of questions and answers, and no other fitness takes one")
        for name in self.rates:
            if name not in Rates.__dataclass_fields__:
                raise unknown(f"rate of {WHAT}", name, Rates.__dataclass_fields__)
        for name in self.start:
            if get_criterion(name).score is None and self.groups != 0:
                raise MoecError(f"{WHAT}: start={name} scores no single experts, so that layers cannot share its choice: use groups=0")

    def run(self, model: Model, context: Context) -> Model:
        """See `Pass`."""
        if self.keep is None and self.top_k is None:
            return model
        layers = need_layers(model.graph, WHAT)
        groups = self._groups(layers)
        worth, spent_on = self._worth(model, layers, groups, context)
        sizes = [(kept_count(g[0], 1.0 if self.keep is None else self.keep, WHAT, least=1), g[0].count) for g in groups]
        start = [self._start(model, groups, sizes, name, context) for name in self.start]
        if all(kept == count for kept, count in sizes):
            every = tuple(one_hot(range(count), count) for _, count in sizes)
            start.insert(0, Candidate(every, every))
        plan = Plan(self.initial, self.prune_steps if self.phase != "merge" else 0, self.merge_steps if self.phase != "prune" else 0)
        search = Search(sizes, worth, plan, Rates(**self.rates), context.seed, start)
        if context.work is not None:
            facts = (model.digest(), asdict(self), spent_on, context.seed, context.need_text(WHAT).fingerprint() if context.text else "")
            search.identity = hashlib.sha256(repr(facts).encode()).hexdigest()
            search.keep_in = Path(context.work) / f"eep-{search.identity[:16]}.safetensors"
        winner, trail = search.run(context.progress)
        result = self._applied(model, groups, winner)
        measured = context.text is not None and context.reference is not None
        context.note(
            WHAT,
            phase=self.phase,
            fitness=self.fitness,
            searched_on=spent_on,
            evaluations=len(trail),
            fitness_by_evaluation=[round(v, 4) for v in trail],
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
        if self.top_k is not None and self.top_k > kept:
            raise MoecError(f"{WHAT}: top_k is {self.top_k}, and %{layer.name} would have {kept} experts")
        return self.top_k or min(layer.top_k, kept)

    def _worth(
        self, model: Model, layers: Sequence[MoeLayer], groups: Sequence[Sequence[MoeLayer]], context: Context
    ) -> tuple[Callable[[Candidate], float], str]:
        """The fitness of candidates, and what it is measured on, in words."""
        text = context.need_text(WHAT)
        if self.fitness == "task":
            assert self.task is not None
            if text.tokenizer is None:
                raise MoecError(f"{WHAT}: the task {self.task} needs the model's tokenizer, which the calibration text came without")
            questions = fitness.read_questions(self.task, text.tokenizer, self.questions, text.ids.shape[1])
            ids, of, words = questions.ids, fitness.of_task(questions), f"{len(questions.ids)} questions of {Path(self.task).name}"
            candidates = Candidates(model, ids, WHAT)
        else:
            ids = text.sample(self.tokens).ids
            candidates, words = Candidates(model, ids, WHAT), f"{ids.numel()} tokens of calibration text"
            truth = candidates.logits([None] * len(layers))
            of = fitness.of_distance(truth) if self.fitness == "kl" else fitness.of_text(ids, truth)

        def worth(candidate: Candidate) -> float:
            return of(candidates.logits(self._choices(groups, candidate)))

        return worth, words

    def _choices(self, groups: Sequence[Sequence[MoeLayer]], candidate: Candidate) -> list[Choice]:
        found = []
        for group, merge, route in zip(groups, candidate.merge, candidate.route, strict=True):
            first = torch.from_numpy(merge).to(torch.get_default_device())
            second = first if merge is route else torch.from_numpy(route).to(first.device)
            found += [Choice(first, second, self._top_k(layer, len(merge))) for layer in group]
        return found

    def _start(
        self, model: Model, groups: Sequence[Sequence[MoeLayer]], sizes: Sequence[tuple[int, int]], name: str, context: Context
    ) -> Candidate:
        criterion, rows = get_criterion(name), []
        looks = {
            v.layer.name: v for v in views(model, [m for g in groups for m in g], criterion.needs, context, f"{WHAT} with start={name}")
        }
        for group, (kept, count) in zip(groups, sizes, strict=True):
            if criterion.score is None:
                rows.append(one_hot(criterion.keep(looks[group[0].name], kept), count))
                continue
            shares = [s / s.mean().clamp_min(1e-30) for s in (criterion.scores(looks[layer.name]) for layer in group)]
            rows.append(one_hot(best(torch.stack(shares).sum(0), kept), count))
        return Candidate(tuple(rows), tuple(rows))

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


PASS = Eep
