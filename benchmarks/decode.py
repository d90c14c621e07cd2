"""Whole models: decode speed against the memory's bandwidth, and the time to the first token of a long prompt.

    python -m benchmarks.decode run MODEL... [--batch 1,32] [-n 128] [--context 128] [--prompt 2048] [--repetitions 3]
                                    [--portion 1] [--load] [--transformers CHECKPOINT] [--kernels] [--json]
    python -m benchmarks.decode build FOLDER --shape olmoe-1b-7b [--recipe int4] [--experts int2_g128,int3_g128]
                                    [--target h100-sxm] [--kv-cache-dtype float32] [--activations bfloat16]

MODEL is an artifact, or a folder of `build`, which compiles a published shape without weights: `run` makes random ones, so that a large
model's speed is measured on a machine that needs neither the compiler nor the checkpoint. `--experts` are formats that the experts of a
layer have in turn.

tokens/s   of greedy decoding, counted over all sequences of the batch, by the clock around all steps but the first 16. The host asks for a
           portion of steps at a time, whose tokens it gets together, as generation does: 8 on a GPU, 1 on a processor, or --portion
MB/token   weights that one sequence reads for a token
roofline   tokens/s of one sequence times bytes a token, over the bandwidth of a device-to-device copy (a GPU) or of reading memory
           (a processor), measured in the same run; of several sequences, which share the weights that they read, it is not stated
prompt     milliseconds to the first logits of one prompt
load       seconds from opening the model to the first token, the files in the page cache; the random weights of a folder of `build` lie in
           a mapped file first with --load, as those of an artifact do

--transformers runs the checkpoint with transformers in bfloat16 beside them: eager, with its default cache. --kernels adds what a decode
step and a prompt launch, from torch's profiler: how often, and the microseconds of all of them, and of the gaps in which nothing runs
(with the profiler at work, whose launches take longer). These are of a call a step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import decode_model
from benchmarks.make_checkpoint import SHAPES
from moec.compiler.cli.bench import bytes_per_token
from moec.runtime.artifact import open_artifact
from moec.runtime.errors import MoecError
from moec.runtime.executor import Executor
from moec.runtime.executors import load_executor
from moec.runtime.measure import read_bandwidth

Row = dict[str, Any]


WARM = 16
"""Steps before the clock starts."""


def decode_speed(executor: Executor, batch: int, context: int, tokens: int, portion: int) -> float:
    """Tokens a second of greedy decoding after `context` random tokens in each of `batch` sequences, so many steps at a time."""
    draw = np.random.default_rng(0)
    handles = [executor.add() for _ in range(batch)]
    try:
        ids = np.concatenate([executor.best([(h, draw.integers(0, executor.vocab_size, context))]).ids for h in handles])
        for steps in (WARM, tokens):
            start = time.perf_counter()
            for done in range(0, steps, portion):
                ids = executor.ahead([(h, ids[i : i + 1]) for i, h in enumerate(handles)], min(portion, steps - done)).ids[-1]
        return batch * tokens / (time.perf_counter() - start)
    finally:
        for handle in handles:
            executor.remove(handle)


def first_token_ms(executor: Executor, prompt: int, repetitions: int) -> float:
    """Milliseconds to the logits of a random prompt: the median of some runs after one to warm up."""
    times = list[float]()
    ids = np.random.default_rng(1).integers(0, executor.vocab_size, prompt)
    for _ in range(repetitions + 1):
        handle = executor.add()
        start = time.perf_counter()
        executor.forward([(handle, ids)])
        times.append(1e3 * (time.perf_counter() - start))
        executor.remove(handle)
    return statistics.median(times[1:])


def bandwidth(executor: Executor) -> float:
    """Bytes a second of the memory that the model lies in."""
    device = getattr(executor, "device", None)
    measured = device.copy_bandwidth() if device is not None else None
    return measured or read_bandwidth(1)


@contextmanager
def opened(path: Path, max_sequences: int, load: bool) -> Iterator[tuple[Executor, int, float]]:
    """The executor of an artifact, or of a folder of `build`, the bytes of weights that a token reads, and seconds to the first token."""
    with tempfile.TemporaryDirectory() as folder:
        if (path / decode_model.FILE).is_file():
            found = decode_model.read(path)
            weights = decode_model.random_weights(found)
            if load:
                weights = decode_model.mapped(weights, Path(folder, "weights"))
            start, read = time.perf_counter(), int(found["bytes_per_token"])
            executor: Executor = decode_model.load(path, weights, max_sequences)
        else:
            start = time.perf_counter()
            artifact = open_artifact(path)
            executor, read = load_executor(artifact, None, max_sequences), bytes_per_token(artifact.manifest) or 0
        handle = executor.add()
        executor.best([(handle, np.array([1]))])
        spent = time.perf_counter() - start
        executor.remove(handle)
        yield executor, read, spent


Kernels = list[tuple[str, float, float]]
"""(kernel, launches, microseconds) of a call, those that take longest first."""


def kernels(executor: Executor, batch: int, context: int, steps: int = 8) -> Kernels:
    """What a decode step launches."""
    draw, handles = np.random.default_rng(0), [executor.add() for _ in range(batch)]
    for handle in handles:
        executor.forward([(handle, draw.integers(0, executor.vocab_size, context))])
    step = [(handle, draw.integers(0, executor.vocab_size, 1)) for handle in handles]
    for _ in range(4):  # from the third on it is one recorded graph
        executor.best(step)
    found = profiled(lambda: executor.best(step), steps)
    for handle in handles:
        executor.remove(handle)
    return found


def prompt_kernels(executor: Executor, prompt: int) -> Kernels:
    """What a prompt launches."""
    ids = np.random.default_rng(1).integers(0, executor.vocab_size, prompt)

    def call() -> None:
        handle = executor.add()
        executor.forward([(handle, ids)])
        executor.remove(handle)

    call()
    return profiled(call, 2)


def profiled(call: Callable[[], object], times: int) -> Kernels:
    """What a call launches, by torch's profiler.

    A kernel is there before the one in front of it has ended, and waits. So its time is from the end of that one to its own end.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.zeros(1, device="cuda")
    spent = dict[str, list[float]]()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(times):
            call()
    events = [event for event in profiler.events() or () if "CUDA" in str(event.device_type)]
    ended = 0.0
    for event in sorted(events, key=lambda event: event.time_range.end):
        start = event.time_range.start
        if 0 < ended < start:
            spent.setdefault(f"(nothing, {'between calls' if 'HtoD' in event.name else 'within a call'})", []).append(start - ended)
        spent.setdefault(event.name, []).append(event.time_range.end - max(ended, start))
        ended = event.time_range.end
    order = sorted(spent.items(), key=lambda item: -sum(item[1]))
    return [(name, len(found) / times, sum(found) / times) for name, found in order]


def measure(path: Path, batches: list[int], args: argparse.Namespace) -> Iterator[Row]:
    """A row for each batch."""
    with opened(path, max(batches), args.load) as (executor, read, loaded):
        memory, limit = bandwidth(executor), executor.context_length
        context, portion = min(args.context, limit - args.n - WARM), args.portion or executor.portion
        prompt = min(args.prompt, limit)
        first = first_token_ms(executor, prompt, args.repetitions)
        for batch in batches:
            speed = statistics.median(decode_speed(executor, batch, context, args.n, portion) for _ in range(args.repetitions))
            row: Row = {"model": path.name, "batch": batch, "tokens_per_s": speed, "bytes_per_token": read}
            row |= {"bandwidth_gb_s": memory / 1e9, "roofline": speed * read / memory if batch == 1 else None}
            row |= {"portion": portion, "prompt": prompt, "first_token_ms": first, "load_s": loaded}
            yield {**row, "kernels": kernels(executor, batch, context)} if args.kernels else row
        if args.kernels:
            yield {"model": path.name, "prompt_tokens": prompt, "kernels": prompt_kernels(executor, prompt)}


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
    loaded = f"{row['load_s']:.2f}" if "load_s" in row else ""
    return f"| {row['model']} | {row['batch']} | {row['tokens_per_s']:.0f} | {size} | {share} | {first} | {loaded} |"


def build(args: argparse.Namespace) -> None:
    """Compile a shape."""
    experts = [] if args.experts is None else args.experts.split(",")
    config = json.loads((args.config / "config.json").read_text()) if args.config else SHAPES[args.shape]
    decode_model.build(args.folder, config, args.recipe, experts, args.target, args.context_length, args.kv_cache_dtype, args.activations)


def run(args: argparse.Namespace) -> None:
    """Measure models and print one table."""
    batches = [int(n) for n in args.batch.split(",")]
    rows: list[Row] = []
    for path in args.models:
        rows += measure(path, batches, args)
    if args.transformers:
        rows += transformers_rows(args.transformers, batches, args)
    if args.json:
        print(json.dumps(rows))
        return
    print("| model | batch | tokens/s | MB/token | roofline | first token, ms (prompt) | load, s |\n|---|---|---|---|---|---|---|")
    print("\n".join(text(row) for row in rows if "batch" in row))
    for row in rows:
        what = f"batch {row['batch']}" if "batch" in row else f"prompt of {row['prompt_tokens']}"
        for name, count, mean in row.get("kernels", ()):
            print(f"{row['model']}, {what}: {count:6.1f} launches {mean:8.1f} us  {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    runs = actions.add_parser("run")
    runs.add_argument("models", type=Path, nargs="+")
    runs.add_argument("--batch", default="1,32")
    runs.add_argument("-n", type=int, default=128)
    runs.add_argument("--context", type=int, default=128)
    runs.add_argument("--prompt", type=int, default=2048)
    runs.add_argument("--repetitions", type=int, default=3)
    runs.add_argument("--portion", type=int, metavar="STEPS", help="steps that the host asks for at a time; 1: a call a step")
    runs.add_argument("--transformers", type=Path, metavar="CHECKPOINT")
    runs.add_argument("--kernels", action="store_true")
    runs.add_argument("--load", action="store_true")
    runs.add_argument("--json", action="store_true")
    builds = actions.add_parser("build")
    builds.add_argument("folder", type=Path)
    builds.add_argument("--shape", choices=sorted(SHAPES), default="olmoe-1b-7b")
    builds.add_argument("--config", type=Path, metavar="CHECKPOINT", help="a folder with config.json, instead of a shape")
    builds.add_argument("--recipe", default="int4")
    builds.add_argument("--experts", metavar="FORMAT,...")
    builds.add_argument("--target", default="h100-sxm")
    builds.add_argument("--kv-cache-dtype", metavar="bfloat16|float32", help="as of moec compile")
    builds.add_argument("--activations", default="float", metavar="float|bfloat16|fp8", help="as of moec compile")
    builds.add_argument("--context-length", type=int, default=4096)
    args = parser.parse_args()
    try:
        (build if args.action == "build" else run)(args)
    except MoecError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
