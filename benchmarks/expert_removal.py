"""What each way of removing or merging experts costs in quality: one table of methods and numbers of experts, as Markdown.

    python -m benchmarks.expert_removal CHECKPOINT --calibration TEXT... --data TEXT... [--keep 12,8,4] [--methods reap,naee,...]
        [--max-tokens N] [--log FILE]

Methods see the calibration text only. Every text of `--data` is scored by `--max-tokens` tokens from its beginning, in windows of
`--context`: mean KL divergence from the checkpoint (nats a token) and perplexity, and the mean over the texts. `--log` keeps each line as
JSON, and a line that is there already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from moec.compiler.calibration.text import read_text
from moec.compiler.context import Context
from moec.compiler.damage import Damage, Distance
from moec.compiler.evaluate import windows
from moec.compiler.frontend import huggingface
from moec.compiler.frontend.tokenizer import load_tokenizer
from moec.compiler.model import Model
from moec.compiler.passes import make_pass, run_passes

SEARCH = {
    "tokens": 4096,
    "initial": 12,
    "groups": 0,
    "start": ["frequency", "soft_frequency", "ean", "reap", "naee"],
    "rates": {"row": 0.05},
}

METHODS: dict[str, list[dict[str, Any]]] = {
    "random, seed 0": [{"remove_experts": {"criterion": "random"}, "seed": 0}],
    "random, seed 1": [{"remove_experts": {"criterion": "random"}, "seed": 1}],
    "random, seed 2": [{"remove_experts": {"criterion": "random"}, "seed": 2}],
    **{
        name: [{"remove_experts": {"criterion": name}}]
        for name in ("router_norm", "frequency", "soft_frequency", "weighted_frequency", "ean", "weighted_ean", "reap", "stun", "naee")
    },
    "reap, global": [{"remove_experts": {"criterion": "reap", "budget": "global"}}],
    "naee, moe_i2": [{"remove_experts": {"criterion": "naee", "budget": "moe_i2"}}],
    "hc_smoe": [{"merge_experts": {"method": "hc_smoe"}}],
    "m_smoe": [{"merge_experts": {"method": "m_smoe"}}],
    "m_smoe, global": [{"merge_experts": {"method": "m_smoe", "budget": "global"}}],
    "eep prune, 4 groups": [{"eep": {"phase": "prune", "tokens": 4096, "initial": 30, "prune_steps": 100}}],
    "eep prune": [{"eep": {**SEARCH, "phase": "prune", "prune_steps": 120}}],
    "eep prune+merge": [{"eep": {**SEARCH, "phase": "both", "prune_steps": 120, "merge_steps": 300}}],
}
"""Passes of each method; `seed` is of the compilation."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--calibration", type=Path, nargs="+", required=True)
    parser.add_argument("--calibration-tokens", type=int, default=1 << 15)
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--keep", default="12,8,4")
    parser.add_argument("--methods", default=";".join(METHODS), help="separated by semicolons")
    parser.add_argument("--max-tokens", type=int, nargs="+", default=[2048], help="of each text, or one number for all")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--log", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    source, tokenizer = Model(*huggingface.load(args.checkpoint)), load_tokenizer(args.checkpoint)
    text = read_text(args.calibration, tokenizer, tokens=args.calibration_tokens, context=args.context)
    limits = args.max_tokens if len(args.max_tokens) > 1 else args.max_tokens * len(args.data)
    scores = {path.stem: held(source, path, tokenizer, args.context, limit) for path, limit in zip(args.data, limits, strict=True)}
    context = Context(text=text, work=args.work)  # without a reference, passes do not measure what is measured here
    before = {name: score(source) for name, score in scores.items()}
    print_line("method", "experts", list(scores), None)
    print_line("none", "all", before, 0.0)
    done = {tuple(entry[k] for k in ("method", "keep")) for entry in entries(args.log)}
    for keep in map(int, args.keep.split(",")):
        for name in args.methods.split(";"):
            if (name, keep) in done:
                continue
            start = time.monotonic()
            model = source
            for step in METHODS[name]:
                context.seed = int(step.get("seed", 0))
                ((kind, options),) = ((k, v) for k, v in step.items() if k != "seed")
                model = run_passes(model, [make_pass(kind, {**options, "keep": keep})], context)
            seconds = time.monotonic() - start
            found = {n: score(model) for n, score in scores.items()}
            print_line(name, keep, found, seconds)
            if args.log is not None:
                entry = {"method": name, "keep": keep, "seconds": seconds, "journal": context.journal[-1]}
                with args.log.open("a") as file:
                    file.write(json.dumps(entry | {"found": {n: d.to_json() for n, d in found.items()}}) + "\n")


def held(source: Model, path: Path, tokenizer: Any, context: int, limit: int) -> Damage:
    """The measure of damage on the beginning of one text."""
    ids = tokenizer.encode(path.read_text(), add_special_tokens=False).ids
    inputs, targets = windows(ids[: limit + 1], context)
    return Damage(source, torch.cat([inputs, targets[:, -1:]], 1))


def entries(log: Path | None) -> list[dict[str, Any]]:
    """What has been measured already."""
    return [json.loads(line) for line in log.read_text().splitlines()] if log is not None and log.exists() else []


def print_line(name: str, keep: object, found: list[str] | dict[str, Distance], seconds: float | None) -> None:
    """One line of the table: KL and perplexity of each text, and the mean KL."""
    if isinstance(found, list):
        cells = [f"{n}: KL, perplexity" for n in found]
        print("| " + " | ".join([name, str(keep), *cells, "mean KL", "seconds"]) + " |")
        print("|---" * (len(cells) + 4) + "|")
        return
    cells = [f"{d.kl_divergence:.3f}, {d.perplexity:.2f}" for d in found.values()]
    mean = sum(d.kl_divergence for d in found.values()) / len(found)
    print("| " + " | ".join([name, str(keep), *cells, f"{mean:.4f}", f"{seconds or 0:.0f}"]) + " |", flush=True)


if __name__ == "__main__":
    main()
