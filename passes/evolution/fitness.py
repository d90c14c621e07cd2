"""What a candidate is worth, in points: more is better, and 100 is undamaged (KL, perplexity) or everything right (task).

    kl           100 exp(-KL(model before || candidate)), mean over tokens
    perplexity   100 times the perplexity of the model before, divided by the candidate's
    task         the per cent of questions all of whose answer tokens are the candidate's first choice, each after the right ones before
                 it (teacher forcing), plus exp of the mean log-likelihood of those tokens, less than one point, which orders ties

Each has a smooth loss a token, for descent: KL(model before || candidate), and negative log-likelihoods of the text or of the answers.

Teacher forcing takes one forward for all questions, where generation would take one a token; it is the same measure as exact match where
the answer follows the prompt at once. `benchmarks/task_accuracy.py` measures exact match by generation, with a compiled artifact.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moec.compiler.errors import MoecError

FITNESS = ("kl", "perplexity", "task")

Worth = Callable[[Tensor], float]
"""From logits [W, T, V] to points."""


def of_distance(truth: Tensor) -> Worth:
    """The fitness `kl` against the logits [W, T, V] of the model before."""
    logp = truth.log_softmax(-1)
    p = logp.exp()
    negentropy = float((p * logp).sum(-1).mean())

    def worth(logits: Tensor) -> float:
        cross = logits.logsumexp(-1).mean() - torch.einsum("wtv,wtv->", p, logits) / logits[..., 0].numel()
        return 100 * float(torch.exp(-(negentropy + cross)))

    return worth


def of_text(ids: Tensor, truth: Tensor) -> Worth:
    """The fitness `perplexity` on windows [W, T]; `truth` has the logits of the model before."""
    wanted = ids[:, 1:].to(truth.device)

    def nll(logits: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), wanted.flatten())

    before = nll(truth)
    return lambda logits: 100 * float(torch.exp(before - nll(logits)))


@dataclass(frozen=True)
class Questions:
    """Prompts with the answers that are to follow, as windows.

    Args:
        ids: [W, T], padded at the end.
        answer: bool [W, T], true where the next token is one of the answer.
    """

    ids: Tensor
    answer: Tensor


def read_questions(path: str | Path, tokenizer: Any, count: int | None, context: int) -> Questions:
    r"""The first `count` questions of a JSONL file that fit into `context` tokens, or all of them.

    Each line has `prompt` and `answer`, texts. A `completion`, where there is one, is what follows the prompt: the reasoning up to the
    answer and the answer. Without one the answer follows at once: after a prompt that ends in "Answer:", or else after "\nAnswer:".

    Raises:
        MoecError: the file cannot be read, or no line fits.
    """
    rows: list[tuple[list[int], int]] = []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise MoecError(f"cannot read the task {path}: {error}") from error
    for number, line in enumerate(lines, 1):
        try:
            prompt, whole = _parts(json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise MoecError(f'the task {path}, line {number}: expected {{"prompt": "...", "answer": "..."}} ({error!r})') from error
        ids = list(tokenizer.encode(whole, add_special_tokens=False).ids)
        start = len(tokenizer.encode(prompt, add_special_tokens=False).ids)
        if start < len(ids) <= context:
            rows.append((ids, start))
        if len(rows) == count:
            break
    if not rows:
        raise MoecError(f"the task {path}: no question fits into {context} tokens")
    length = max(len(ids) for ids, _ in rows)
    padded = torch.zeros(len(rows), length, dtype=torch.int64)
    answer_at = torch.zeros(len(rows), length, dtype=torch.bool)
    for row, (ids, start) in enumerate(rows):
        padded[row, : len(ids)] = torch.tensor(ids)
        answer_at[row, start - 1 : len(ids) - 1] = True
    return Questions(padded, answer_at)


def _parts(entry: dict[str, Any]) -> tuple[str, str]:
    """A prompt, and the prompt with what is to follow."""
    prompt, answer = str(entry["prompt"]), str(entry["answer"])
    lead = " " if prompt.rstrip().endswith("Answer:") else "\nAnswer: "
    return prompt, prompt + str(entry.get("completion") or lead + answer)


def of_task(questions: Questions) -> Worth:
    """The fitness `task`."""
    wanted = questions.ids.roll(-1, 1)

    def worth(logits: Tensor) -> float:
        right = (logits.argmax(-1) == wanted) | ~questions.answer
        logp = logits[questions.answer].log_softmax(-1).gather(-1, wanted[questions.answer][:, None])
        return 100 * float(right.all(1).double().mean()) + float(logp.mean().exp())

    return worth


def loss_of_distance(logits: Tensor, truth: Tensor) -> Tensor:
    """KL(truth || logits), the mean over tokens: logits [W, T, V]."""
    logp = truth.log_softmax(-1)
    return (logp.exp() * (logp - logits.log_softmax(-1))).sum(-1).mean()


def loss_of_text(logits: Tensor, ids: Tensor, wanted: Tensor | None = None) -> Tensor:
    """The mean negative log-likelihood of the next tokens, of those where `wanted` (bool [W, T]) is true: logits [W, T, V]."""
    targets = ids.roll(-1, 1).to(logits.device)
    if wanted is None:
        wanted = torch.ones_like(targets, dtype=torch.bool)
        wanted[:, -1] = False
    wanted = wanted.to(logits.device)
    return torch.nn.functional.cross_entropy(logits[wanted], targets[wanted])
