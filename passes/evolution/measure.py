"""What candidates are measured on: the fitness of choices of experts, and its loss on some windows or questions, for descent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moec.compiler.calibration.text import Text
from moec.compiler.candidates import Candidates, Choice
from moec.compiler.errors import MoecError
from moec.compiler.model import Model
from moec.passes.evolution import fitness
from moec.passes.evolution.fitness import Questions, Worth


@dataclass(frozen=True)
class Measure:
    """A measure of candidates.

    Args:
        candidates: runs them on what the fitness is measured on.
        of: the fitness of logits.
        words: what it is measured on.
        kind: a name of `fitness.FITNESS`.
        pool: [W, T] tokens to learn from; `answer`, bool [W, T], is true before those that count in the fitness `task`.
    """

    candidates: Candidates
    of: Worth
    words: str
    kind: str
    pool: Tensor
    answer: Tensor | None = None

    def worth(self, choices: Sequence[Choice]) -> float:
        """The fitness of choices, one a layer."""
        return self.of(self.candidates.logits(choices))

    def loss(self, choices: Sequence[Choice], rows: Tensor) -> Tensor:
        """The loss of choices on some rows of the pool, on their matrices' tape."""
        rows = rows.to(self.pool.device)
        ids = self.pool[rows]
        answer = None if self.answer is None else self.answer[rows]
        if answer is not None:  # what is padding in all rows of the batch
            used = int(answer.any(0).nonzero().max()) + 2
            ids, answer = ids[:, :used], answer[:, :used]
        logits = self.candidates.differentiable(choices, ids)
        if self.kind != "kl":
            return fitness.loss_of_text(logits, ids, answer)
        with torch.no_grad():
            truth = self.candidates.differentiable([None] * len(choices), ids)
        return fitness.loss_of_distance(logits, truth)


def on_text(model: Model, kind: str, ids: Tensor, pool: Tensor, what: str) -> Measure:
    """The fitness `kl` or `perplexity` on windows of text [W, T], and its loss on windows of a pool."""
    candidates = Candidates(model, ids, what)
    truth = candidates.logits([None] * len(candidates.layers))
    of = fitness.of_distance(truth) if kind == "kl" else fitness.of_text(ids, truth)
    return Measure(candidates, of, f"{ids.numel()} tokens of calibration text", kind, pool)


def on_task(model: Model, path: str, text: Text, questions: int, what: str) -> Measure:
    """The fitness `task` on the first questions of a file; what is learned from is all of the file.

    Raises:
        MoecError: the text came without a tokenizer, or the file has no questions.
    """
    if text.tokenizer is None:
        raise MoecError(f"{what}: the task {path} needs the model's tokenizer, which the calibration text came without")
    found = fitness.read_questions(path, text.tokenizer, None, text.ids.shape[1])
    some = Questions(found.ids[:questions], found.answer[:questions])
    words = f"{len(some.ids)} questions of {Path(path).name}"
    return Measure(Candidates(model, some.ids, what), fitness.of_task(some), words, "task", found.ids, found.answer)
