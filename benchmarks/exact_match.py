"""Exact match on questions by greedy generation in torch, for models that are not compiled; and questions with the reasoning of a text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.task_accuracy import answer_of
from moec.compiler.gradients import Tape
from moec.compiler.model import Model

ENDS = ("\n\n", "<|endoftext|>")
"""What ends the answer to a question, in a text and in what a model writes."""

BATCH_TOKENS = 16384


def with_reasoning(questions: Path, texts: Sequence[str]) -> list[dict[str, str]]:
    """The questions of a JSONL file that stand in a text with what follows them: prompt, answer, and that as `completion`."""
    whole, rows = "\n\n".join(texts), []
    for line in questions.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        at = whole.find(row["prompt"])
        if at < 0:
            continue
        follows = whole[at + len(row["prompt"]) :]
        completion = follows[: min((i for end in ENDS if (i := follows.find(end)) >= 0), default=len(follows))].rstrip("\n")
        if answer_of(row["prompt"], completion) == str(row["answer"]).strip():
            rows.append({"prompt": row["prompt"], "answer": str(row["answer"]), "completion": completion})
    return rows


def exact_match(model: Model, tokenizer: Any, questions: Sequence[dict[str, str]], most: int = 96) -> tuple[int, int]:
    """How many questions are answered, and how many rightly, when the model writes `most` tokens at most.

    All tokens so far are run again for each new one: simple, and fast enough where many questions are one batch.
    """
    prompts = [tokenizer.encode(q["prompt"], add_special_tokens=False).ids for q in questions]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    tape, size, written = Tape(model.graph, model.weights, keep=True), BATCH_TOKENS // (len(prompts[order[-1]]) + most), [""] * len(prompts)
    for first in range(0, len(order), max(1, size)):
        part = order[first : first + max(1, size)]
        for index, ids in zip(part, _write(tape, tokenizer, [prompts[i] for i in part], most), strict=True):
            text = tokenizer.decode(ids, skip_special_tokens=False)
            written[index] = text[: min((i for end in ENDS if (i := text.find(end)) >= 0), default=len(text))]
    found = [answer_of(q["prompt"], text) for q, text in zip(questions, written, strict=True)]
    return sum(f is not None for f in found), sum(f == str(q["answer"]).strip() for f, q in zip(found, questions, strict=True))


def _write(tape: Tape, tokenizer: Any, prompts: Sequence[Sequence[int]], most: int) -> list[list[int]]:
    """What follows each prompt, greedily, up to the first end."""
    lengths = [len(p) for p in prompts]
    rows, going = [list(p) for p in prompts], list(range(len(prompts)))
    for _ in range(most):
        ids = _padded([rows[i] for i in going])
        positions = torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1)
        logits = tape.logits([{"ids": ids, "positions": positions}])[0]
        last = torch.tensor([len(rows[i]) - 1 for i in going], device=logits.device)
        chosen = logits[torch.arange(len(going), device=logits.device), last].argmax(-1).tolist()
        for row, token in zip(going, chosen, strict=True):
            rows[row].append(token)
        going = [i for i in going if not any(end in tokenizer.decode(rows[i][lengths[i] :], skip_special_tokens=False) for end in ENDS)]
        if not going:
            break
    return [row[length:] for row, length in zip(rows, lengths, strict=True)]


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """Rows of tokens as [R, T], with zeros at their ends, which no token before sees."""
    length = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (length - len(row))] for row in rows])
