"""The loop of the search: one child a step, kept with all the others; what there is can be saved and gone on from."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from moec.compiler.errors import MoecError
from moec.compiler.progress import Progress
from moec.passes.evolution.genes import Candidate, Rates, cross, mutate, mutate_one_hot, random_candidate

FEWEST_PARENTS = 6
"""Crossover chooses among at least so many (the released configuration)."""

SAVE_EVERY = 16


@dataclass(frozen=True)
class Plan:
    """How long to search.

    Args:
        initial: candidates to begin with.
        prune_steps: children of one-hot matrices, then `merge_steps` of any.
    """

    initial: int
    prune_steps: int
    merge_steps: int


@dataclass
class Search:
    """A search.

    Args:
        sizes: (E', E) of each group.
        worth: the fitness of a candidate.
        start: candidates to begin with besides random ones.
        keep_in: where to keep what has been found; None keeps nothing.
        identity: tells this search from others in the file.
    """

    sizes: Sequence[tuple[int, int]]
    worth: Callable[[Candidate], float]
    plan: Plan
    rates: Rates
    seed: int = 0
    start: Sequence[Candidate] = ()
    keep_in: Path | None = None
    identity: str = ""

    def run(self, progress: Progress) -> tuple[Candidate, list[float]]:
        """The best candidate, and the best fitness after each evaluation."""
        self._rng = np.random.default_rng(self.seed)
        found = self._restore()
        plan = self.plan
        total = plan.initial + plan.prune_steps + plan.merge_steps
        with progress.counter("search for experts") as count:
            while len(found) < total:
                child = self._next(found, len(found))
                found.append(replace(child, fitness=self.worth(child)))
                if self.keep_in is not None and (len(found) % SAVE_EVERY == 0 or len(found) == total):
                    self._save(found)
                count(len(found), total)
        values = [c.fitness for c in found]
        return found[int(np.argmax(values))], np.maximum.accumulate(values).tolist()

    def _next(self, found: list[Candidate], at: int) -> Candidate:
        plan, rng = self.plan, self._rng
        if at < plan.initial:
            return self.start[at] if at < len(self.start) else random_candidate(self.sizes, rng)
        ranked = sorted(found, key=lambda c: -c.fitness)
        if at < plan.initial + plan.prune_steps:
            return mutate_one_hot(self._parent(ranked, self.rates.mutation_points, 1), self.rates, rng)
        if rng.random() < self.rates.crossover:
            first, second = (self._parent(ranked, self.rates.crossover_points, FEWEST_PARENTS) for _ in range(2))
            return cross(first, second, self.rates, rng)
        return mutate(self._parent(ranked, self.rates.mutation_points, 1), self.rates, rng)

    def _parent(self, ranked: list[Candidate], points: float, least: int) -> Candidate:
        """One of those near the best."""
        near = [c for c in ranked if c.fitness >= ranked[0].fitness - points]
        pool = near if len(near) >= least else ranked[:least]
        return pool[self._rng.integers(len(pool))]

    def _save(self, found: list[Candidate]) -> None:
        assert self.keep_in is not None
        tensors = {
            f"{kind}.{group}": np.stack([getattr(c, kind)[group] for c in found])
            for kind in ("merge", "route")
            for group in range(len(self.sizes))
        }
        tensors["fitness"] = np.array([c.fitness for c in found])
        facts = {"identity": self.identity, "rng": self._rng.bit_generator.state}
        part = self.keep_in.with_name(self.keep_in.name + ".part")
        try:
            save_file(tensors, part, metadata={"moec": json.dumps(facts)})
            part.replace(self.keep_in)
        except (OSError, SafetensorError) as error:
            part.unlink(missing_ok=True)
            raise MoecError(f"cannot keep the search in {self.keep_in}: {error}") from error

    def _restore(self) -> list[Candidate]:
        """What an interrupted run of the same search found; nothing if it was another one."""
        if self.keep_in is None or not self.keep_in.exists():
            return []
        try:
            with safe_open(self.keep_in, framework="np") as file:
                facts: dict[str, Any] = json.loads(file.metadata()["moec"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise MoecError(f"{self.keep_in}: not what a search keeps ({error}); remove the file to search anew") from error
        if facts["identity"] != self.identity:
            return []
        self._rng.bit_generator.state = facts["rng"]
        groups = range(len(self.sizes))
        return [
            Candidate(tuple(tensors[f"merge.{g}"][i] for g in groups), tuple(tensors[f"route.{g}"][i] for g in groups), float(fitness))
            for i, fitness in enumerate(tensors["fitness"])
        ]
