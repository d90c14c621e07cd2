"""A climb by single exchanges, before or in place of the evolution of https://arxiv.org/abs/2407.00945: an addition of ours.

    1  for each expert of each group, measure the candidate without it (if it is kept) or with it (if it is not)
    2  try exchanges, the most promising first: those with the largest sum of both measures; go on from whatever is better
    3  after some without success, measure anew; stop where no exchange is better, or when all evaluations are used

An exchange takes an expert from a group and gives it another one; where counts are free it may give another group one, but not the last.
The climb uses no random numbers, so that going on after an interruption is going the same way with known answers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moec.compiler.errors import MoecError
from moec.compiler.progress import Progress
from moec.passes.evolution.genes import Candidate, one_hot

Kept = tuple[frozenset[int], ...]
"""The experts of each group."""

Place = tuple[int, int]
"""A group, and an expert of it."""

PATIENCE = 32
"""So many exchanges without success call for new measures."""

SAVE_EVERY = 16


def candidate_of(kept: Kept, counts: Sequence[int], fitness: float = float("-inf")) -> Candidate:
    """The candidate that keeps these experts, of `counts` in each group."""
    rows = tuple(one_hot(sorted(experts), count) for experts, count in zip(kept, counts, strict=True))
    return Candidate(rows, rows, fitness)


def kept_of(candidate: Candidate) -> Kept:
    """The experts of a candidate whose matrices are one-hot."""
    return tuple(frozenset(row.argmax(1).tolist()) for row in candidate.merge)


class _SpentError(Exception):
    """All evaluations are used."""


@dataclass
class Climb:
    """A climb.

    Args:
        counts: experts of each group before.
        worth: the fitness of a candidate.
        evaluations: of `worth`, at most.
        layers: of each group, where groups may take experts from each other if they have as many; None where they may not.
        keep_in: where to keep what is known; None keeps nothing.
        identity: tells this climb from others in the file.
    """

    counts: Sequence[int]
    worth: Callable[[Candidate], float]
    evaluations: int
    layers: Sequence[int] | None = None
    keep_in: Path | None = None
    identity: str = ""
    trail: list[float] = field(default_factory=list)
    """The best fitness after each evaluation."""

    def run(self, starts: Sequence[Candidate], progress: Progress) -> Candidate:
        """The best candidate on the way up from the best of some; the matrices of all are one-hot."""
        self._known, self._used = self._restore(), set[str]()
        self._best: tuple[float, Kept] | None = None
        with progress.counter("climb") as self._count:
            try:
                for start in starts:
                    self._value(kept_of(start))
                while self._pass():
                    pass
            except _SpentError:
                pass
        self._save()
        assert self._best is not None
        value, kept = self._best
        return candidate_of(kept, self.counts, value)

    def _pass(self) -> bool:
        """Measure each expert, and try exchanges; whether one was better."""
        assert self._best is not None
        start, failed = self._best, 0
        several = [(g, e) for g, e in self._places() if start[1][g] != {e}]
        worth = {place: self._value(_toggled(start[1], *place), whole=False) for place in several}
        for out, new in self._exchanges(start[1], worth):
            kept = self._best[1]
            if out[1] not in kept[out[0]] or new[1] in kept[new[0]] or (out[0] != new[0] and len(kept[out[0]]) == 1):
                continue
            before = self._best
            self._value(_toggled(_toggled(kept, *out), *new))
            failed = 0 if self._best is not before else failed + 1
            if failed >= PATIENCE and self._best is not start:
                break
        return self._best is not start

    def _places(self) -> list[Place]:
        """All experts, the last groups first: what comes before a group is known from the candidate before."""
        return [(g, e) for g in reversed(range(len(self.counts))) for e in range(self.counts[g])]

    def _exchanges(self, kept: Kept, worth: Mapping[Place, float]) -> list[tuple[Place, Place]]:
        """Pairs of an expert to leave out and one to take in, the most promising first."""
        outs = [p for p in self._places() if p[1] in kept[p[0]]]
        news = [p for p in self._places() if p[1] not in kept[p[0]]]
        pairs = [(out, new) for out in outs for new in news if out[0] == new[0] or self._balanced(out[0], new[0])]
        return sorted(pairs, key=lambda pair: -worth.get(pair[0], 0.0) - worth[pair[1]])

    def _balanced(self, out: int, new: int) -> bool:
        return self.layers is not None and self.layers[out] == self.layers[new]

    def _value(self, kept: Kept, *, whole: bool = True) -> float:
        """The fitness of a candidate; what is not `whole` has an expert too many or too few, and cannot be the best."""
        name = json.dumps([sorted(experts) for experts in kept])
        if name not in self._used:
            if len(self._used) >= self.evaluations and self._best is not None:
                raise _SpentError
            self._used.add(name)
            if name not in self._known:
                self._known[name] = self.worth(candidate_of(kept, self.counts))
                if len(self._known) % SAVE_EVERY == 0:
                    self._save()
            self._count(len(self._used), self.evaluations)
        value = self._known[name]
        if whole and (self._best is None or value > self._best[0]):
            self._best = value, kept
        self.trail.append(self._best[0] if self._best else value)
        return value

    def _save(self) -> None:
        if self.keep_in is None:
            return
        part = self.keep_in.with_name(self.keep_in.name + ".part")
        try:
            part.write_text(json.dumps({"identity": self.identity, "fitness": self._known}))
            part.replace(self.keep_in)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise MoecError(f"cannot keep the search in {self.keep_in}: {error}") from error

    def _restore(self) -> dict[str, float]:
        """What an interrupted climb measured."""
        if self.keep_in is None or not self.keep_in.exists():
            return {}
        try:
            facts = json.loads(self.keep_in.read_text())
            return dict(facts["fitness"]) if facts["identity"] == self.identity else {}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise MoecError(f"{self.keep_in}: not what a search keeps ({error}); remove the file to search anew") from error


def _toggled(kept: Kept, group: int, expert: int) -> Kept:
    """The choice with one expert more or less."""
    return (*kept[:group], kept[group] ^ {expert}, *kept[group + 1 :])
