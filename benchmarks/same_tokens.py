"""Do artifacts generate what transformers generates? Greedy tokens of float32 artifacts against `generate` in float32.

    python -m benchmarks.same_tokens CHECKPOINT --data TEXT [--backends tvm,onnx] [--prompts 20] [-n 128]

A difference counts only if the two best logits of the reference differ by more than `--tie` at the first place where the tokens part.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.two_artifacts import greedy, partings, spread
from moec import runtime
from moec.compiler.frontend.tokenizer import load_tokenizer
from moec.compiler.pipeline import compile_model


def prompts(checkpoint: Path, text: str, count: int, length: int) -> list[list[int]]:
    """`count` pieces of `length` tokens, spread evenly over the text."""
    ids = load_tokenizer(checkpoint).encode(text, add_special_tokens=False).ids
    return spread(ids, count, length)


def reference(model: Any, prompt: list[int], new_tokens: int) -> list[int]:
    """transformers' greedy continuation."""
    out = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return [int(t) for t in out[0, len(prompt) :]]


def margin(model: Any, ids: list[int]) -> float:
    """The difference between the two best logits after these tokens."""
    with torch.no_grad():
        best = model(torch.tensor([ids])).logits[0, -1].topk(2).values
    return float(best[0] - best[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--backends", default="tvm,onnx")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("-n", type=int, default=128)
    parser.add_argument("--tie", type=float, default=1e-4)
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=torch.float32).eval()
    pieces = prompts(args.checkpoint, args.data.read_text(), args.prompts, args.prompt_tokens)
    expected = [reference(model, p, args.n) for p in pieces]
    with tempfile.TemporaryDirectory() as folder:
        for backend in args.backends.split(","):
            artifact = Path(folder) / f"{backend}.moec"
            compile_model(args.checkpoint, artifact, backend=backend, recipe="f32")
            session = runtime.load(artifact)
            found = partings(pieces, expected, greedy(session, pieces, args.n), lambda ids: margin(model, ids), args.tie)
            print(json.dumps({"backend": backend, "prompts": len(pieces), "tokens": args.n, **found}))


if __name__ == "__main__":
    main()
