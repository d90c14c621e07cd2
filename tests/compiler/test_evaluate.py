"""Evaluation against a plain loop over transformers' own model."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from moec.compiler.errors import MoecError
from moec.compiler.evaluate import evaluate, windows
from moec.compiler.frontend.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[2]
MODEL, TEXT = ROOT / "examples/models/tiny-moe", ROOT / "examples/data/prose_en.txt"


def test_windows() -> None:
    inputs, targets = windows(np.arange(10), 3)
    assert inputs.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert targets.tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert windows(np.arange(9), 3)[0].shape == (2, 3)  # the last window's next token is missing
    with pytest.raises(MoecError, match="one window of 9 needs 10"):
        windows(np.arange(9), 9)


def test_perplexity_of_a_checkpoint(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT.read_text()[:1500])
    found = evaluate(MODEL, text, reference=MODEL, context=64)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    ids = load_tokenizer(MODEL).encode(text.read_text(), add_special_tokens=False).ids
    total, count = 0.0, 0
    for start in range(0, len(ids) - 64, 64):
        with torch.no_grad():
            logp = model(torch.tensor([ids[start : start + 64]])).logits[0].log_softmax(-1)
        for at in range(64):
            total, count = total - float(logp[at, ids[start + at + 1]]), count + 1
    assert found.tokens == count
    assert found.nll == pytest.approx(total / count, abs=1e-4)
    assert found.perplexity == pytest.approx(math.exp(found.nll))
    assert found.kl_divergence == 0.0
    assert found.top1_agreement == 1.0


def test_bad_input(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Too short.")
    with pytest.raises(MoecError, match="give more text"):
        evaluate(MODEL, tmp_path / "short.txt")
    with pytest.raises(MoecError, match="cannot read the text"):
        evaluate(MODEL, tmp_path / "none.txt")
    with pytest.raises(MoecError, match="the model's context is 512"):
        evaluate(MODEL, TEXT, context=513)
    with pytest.raises(MoecError, match="no such folder"):
        evaluate(tmp_path / "none", TEXT)
