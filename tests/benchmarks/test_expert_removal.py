"""The benchmark of expert removal: its methods are passes, questions find their reasoning, and generation is greedy."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from benchmarks.exact_match import _write, with_reasoning
from benchmarks.removal_methods import METHODS, SETS, chains
from moec.compiler.frontend.tokenizer import load_tokenizer
from moec.compiler.gradients import Tape
from moec.compiler.interpreter import Interpreter
from moec.compiler.passes import make_pass
from tests import tiny


def test_methods_are_passes() -> None:
    for steps in METHODS.values():
        for step in steps:
            ((kind, options),) = ((k, v) for k, v in step.items() if k != "seed")
            make_pass(kind, {**options, "task": "questions.jsonl"} if options.get("fitness") == "task" else options)
    assert {name for names in SETS.values() for name in names} <= set(METHODS)
    assert sorted(name for chain in chains(list(METHODS)) for name in chain) == sorted(METHODS)


def test_questions_find_their_reasoning(tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    rows = [{"prompt": f"Question: {n} + 1?\nReasoning:", "answer": str(n + 1)} for n in range(3)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = ["Question: 0 + 1?\nReasoning: one.\nAnswer: 1\n\nQuestion: 1 + 1?\nReasoning: two.\nAnswer: 3", "Question: 2"]
    texts.append("x\n\nQuestion: 2 + 1?\nReasoning: a\nAnswer: 3\n<|endoftext|>\nQuestion")
    found = with_reasoning(file, texts)
    assert [row["completion"] for row in found] == [" one.\nAnswer: 1", " a\nAnswer: 3"]  # the second one's answer is another


def test_greedy_generation() -> None:
    model, tokenizer = tiny.model(), load_tokenizer(tiny.MODEL)
    prompts = [tokenizer.encode(text, add_special_tokens=False).ids for text in ("The", "Once upon a time")]
    found = _write(Tape(model.graph, model.weights, keep=True), tokenizer, prompts, 4)
    interpreter = Interpreter(model.graph, model.weights)
    for prompt, follows in zip(prompts, found, strict=True):
        assert 1 <= len(follows) <= 4
        ids = list(prompt)
        for token in follows:
            (logits,) = interpreter(ids=torch.tensor([ids]), positions=torch.arange(len(ids))[None])
            assert int(logits[0, -1].argmax()) == token
            ids.append(token)
