"""Whole models: decode speed against the memory's bandwidth, and the time to the first token of a long prompt.

    python -m benchmarks.decode ARTIFACT... [--batch 1,32] [-n 128] [--context 128] [--prompt 2048] [--repetitions 3]
                                [--transformers CHECKPOINT] [--json]

tokens/s   of greedy decoding, logits on the host at every step, counted over all sequences of the batch
MB/token   weights that one sequence reads for a token, from the artifact
roofline   tokens/s of one sequence times bytes a token, over the bandwidth of a device-to-device copy (a GPU) or of reading memory
           (a processor), measured in the same run; of several sequences, which share the weights that they read, it is not stated
prompt     milliseconds to the first logits of one prompt

--transformers runs the checkpoint with transformers in bfloat16 beside them: eager, with its default cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moec import runtime
from moec.compiler.cli.bench import bytes_per_token
from moec.runtime.errors import MoecError
from moec.runtime.measure import read_bandwidth
from moec.runtime.session import Session

Row = dict[str, Any]


def decode_speed(session: Session, batch: int, context: int, tokens: int) -> float:
    """Tokens a second of greedy decoding after `context` random tokens in each of `batch` sequences."""
    executor = session.executor
    draw = np.random.default_rng(0)
    handles = [executor.add() for _ in range(batch)]
    try:
        logits = np.concatenate([executor.forward([(h, draw.integers(0, executor.vocab_size, context))]) for h in handles])
        warm = 8
        for step in range(tokens + warm):
            if step == warm:
                start = time.perf_counter()
            best = logits.argmax(-1)
            logits = executor.forward([(h, best[i : i + 1]) for i, h in enumerate(handles)])
        return batch * tokens / (time.perf_counter() - start)
    finally:
        for handle in handles:
            executor.remove(handle)


def first_token_ms(session: Session, prompt: int, repetitions: int) -> float:
    """Milliseconds to the logits of a random prompt: the median of some runs after one to warm up."""
    executor, times = session.executor, list[float]()
    ids = np.random.default_rng(1).integers(0, executor.vocab_size, prompt)
    for _ in range(repetitions + 1):
        handle = executor.add()
        start = time.perf_counter()
        executor.forward([(handle, ids)])
        times.append(1e3 * (time.perf_counter() - start))
        executor.remove(handle)
    return statistics.median(times[1:])


def bandwidth(session: Session) -> float:
    """Bytes a second of the memory that the model lies in."""
    device = getattr(session.executor, "device", None)
    measured = device.copy_bandwidth() if device is not None else None
    return measured or read_bandwidth(1)


def measure(path: Path, batches: list[int], args: argparse.Namespace) -> Iterator[Row]:
    """A row for each batch."""
    start = time.perf_counter()
    with runtime.load(path, max_sequences=max(batches)) as session:
        loaded = time.perf_counter() - start
        limit = session.executor.context_length
        memory, read = bandwidth(session), bytes_per_token(session.artifact.manifest) or 0
        prompt = min(args.prompt, limit)
        first = first_token_ms(session, prompt, args.repetitions)
        for batch in batches:
            speeds = [decode_speed(session, batch, min(args.context, limit - args.n - 8), args.n) for _ in range(args.repetitions)]
            speed = statistics.median(speeds)
            row: Row = {"model": path.name, "batch": batch, "tokens_per_s": speed, "bytes_per_token": read}
            row |= {"bandwidth_gb_s": memory / 1e9, "roofline": speed * read / memory if batch == 1 else None}
            yield {**row, "prompt": prompt, "first_token_ms": first, "load_s": loaded}


def transformers_rows(checkpoint: Path, batches: list[int], args: argparse.Namespace) -> Iterator[Row]:
    """The same of a checkpoint run by transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).eval().to(device)
    for batch in batches:
        ids = torch.randint(0, model.config.vocab_size, (batch, args.context), device=device)
        options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        times = {}
        for new in (8, args.n + 8):
            model.generate(ids, max_new_tokens=new, min_new_tokens=new, **options)
            start = time.perf_counter()
            model.generate(ids, max_new_tokens=new, min_new_tokens=new, **options)
            times[new] = time.perf_counter() - start
        yield {"model": "transformers", "batch": batch, "tokens_per_s": batch * args.n / (times[args.n + 8] - times[8])}


def text(row: Row) -> str:
    """A row of the Markdown table."""
    share = f"{100 * row['roofline']:.0f} %" if row.get("roofline") else ""
    size = f"{row['bytes_per_token'] / 1e6:.1f}" if "bytes_per_token" in row else ""
    first = f"{row['first_token_ms']:.1f} ({row['prompt']})" if "first_token_ms" in row else ""
    return f"| {row['model']} | {row['batch']} | {row['tokens_per_s']:.0f} | {size} | {share} | {first} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", type=Path, nargs="+")
    parser.add_argument("--batch", default="1,32")
    parser.add_argument("-n", type=int, default=128)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--transformers", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    batches = [int(n) for n in args.batch.split(",")]
    rows: list[Row] = []
    try:
        for path in args.artifacts:
            rows += measure(path, batches, args)
    except MoecError as error:
        parser.exit(2, f"{error}\n")
    if args.transformers:
        rows += transformers_rows(args.transformers, batches, args)
    if args.json:
        print(json.dumps(rows))
        return
    print("| model | batch | tokens/s | MB/token | roofline | first token, ms (prompt) |\n|---|---|---|---|---|---|")
    print("\n".join(map(text, rows)))


if __name__ == "__main__":
    main()
