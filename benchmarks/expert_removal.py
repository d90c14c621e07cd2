"""What each way of removing or merging experts costs in quality: one table of methods and numbers of experts, as Markdown.

    python -m benchmarks.expert_removal CHECKPOINT --calibration TEXT... --data TEXT... [--keep 12,8,4] [--methods mixed | "reap;naee;..."]
        [--single-domain] [--questions FILE --task FILE] [--max-tokens N] [--device cuda] [--jobs N] [--work FOLDER] [--log FILE]

Methods see the calibration text only. Every text of `--data` is scored by `--max-tokens` tokens from its beginning, in windows of
`--context`: mean KL divergence from the checkpoint (nats a token), perplexity, and by how much that is more than the checkpoint's.

`--single-domain` makes a table for each calibration text that has a text of the same name in the data: methods see it and nothing else.
`--questions` is for the methods whose name has "task" in it: they search on these questions, with the reasoning that follows each in the
calibration text. `--task` adds exact match on other questions, by greedy generation in torch. `--jobs` processes share the methods among
them, and those that begin with the same climb are one's; `--work` keeps the climb and much else from one to the next. `--log` keeps each
line as JSON, and a line that is there already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.exact_match import exact_match, with_reasoning
from benchmarks.removal_methods import METHODS, SETS, chains
from moec.compiler.calibration.text import read_text
from moec.compiler.context import Context
from moec.compiler.damage import Damage, Distance
from moec.compiler.evaluate import windows
from moec.compiler.frontend import huggingface
from moec.compiler.frontend.tokenizer import load_tokenizer
from moec.compiler.model import Model
from moec.compiler.passes import make_pass, run_passes

Entry = dict[str, Any]
"""A line of the table: domain, method, keep, seconds, journal, found by text, and exact match."""


class Bench:
    """Measures methods in one process, on the texts of one domain, or of all."""

    def __init__(self, args: argparse.Namespace, domain: str) -> None:
        self.args, self.device = args, torch.device(args.device)
        torch.set_num_threads(args.threads)
        self.source, self.tokenizer = _source(args.checkpoint)
        calibration, data = ([p for p in paths if domain in ("", p.stem)] for paths in (args.calibration, args.data))
        text = read_text(calibration, self.tokenizer, tokens=args.calibration_tokens, context=args.context)
        limits = dict(zip(args.data, args.max_tokens * (len(args.data) if len(args.max_tokens) == 1 else 1), strict=True))
        with self.device:
            self.scores = {path.stem: held(self.source, path, self.tokenizer, args.context, limits[path]) for path in data}
        self.asked = None if args.task is None else [json.loads(line) for line in args.task.read_text().splitlines()][: args.n]
        self.context = Context(text=text, work=args.work)
        self.questions = None if args.questions is None else self._reasoned(calibration)

    def _reasoned(self, calibration: list[Path]) -> Path:
        """The questions to search on, with the reasoning that the calibration text has."""
        file: Path = (self.args.work or Path()) / f"{self.args.questions.stem}-reasoned.jsonl"
        rows = with_reasoning(self.args.questions, [path.read_text() for path in calibration])
        if not rows:
            sys.exit(f"none of the questions of {self.args.questions} is in the calibration text with what follows it")
        content = "".join(json.dumps(row) + "\n" for row in rows)
        if not file.exists() or file.read_text() != content:
            part = file.with_name(f"{file.name}.{multiprocessing.current_process().pid}")
            part.write_text(content)
            part.replace(file)
        return file

    def score(self, model: Model) -> Entry:
        """What there is to know about a model."""
        with self.device:
            entry: Entry = {"found": {name: score(model).to_json() for name, score in self.scores.items()}}
            if self.asked is not None:
                entry["exact_match"] = [*exact_match(model, self.tokenizer, self.asked), len(self.asked)]
        return entry

    def run(self, method: str, keep: int) -> Entry:
        """One line."""
        start, model = time.monotonic(), self.source
        # Without a reference, passes do not measure what is measured here; but some learn from it.
        self.context.reference = self.source if any("tune_routers" in step for step in METHODS[method]) else None
        with self.device:
            for step in METHODS[method]:
                self.context.seed = int(step.get("seed", 0))
                ((kind, given),) = ((k, v) for k, v in step.items() if k != "seed")
                counts = kind in ("eep", "merge_experts", "remove_experts")
                options = {**given, "keep": keep} if counts else dict(given)
                if options.get("fitness") == "task":
                    if self.questions is None:
                        sys.exit(f"{method}: needs --questions FILE")
                    options["task"] = str(self.questions)
                model = run_passes(model, [make_pass(kind, options)], self.context)
        seconds = time.monotonic() - start
        return {"method": method, "keep": keep, "seconds": seconds, "journal": self.context.journal[-1], **self.score(model)}


@cache
def _source(checkpoint: Path) -> tuple[Model, Any]:
    return Model(*huggingface.load(checkpoint)), load_tokenizer(checkpoint)


_benches: dict[str, Bench] = {}


def work(args: argparse.Namespace, domain: str, keep: int, methods: list[str]) -> list[Entry]:
    """Some lines, in this process, each of which is kept at once; no `keep` means the model as it is."""
    bench = _benches.get(domain) or _benches.setdefault(domain, Bench(args, domain))
    found = []
    for name in methods:
        line = bench.run(name, keep) if keep else {"method": name, "keep": "all", "seconds": 0.0, **bench.score(bench.source)}
        found.append({"domain": domain, **line})
        print(f"{domain} {name} {line['keep']}: {line['seconds']:.0f} s", file=sys.stderr, flush=True)
        if args.log is not None:
            with args.log.open("a") as file:
                file.write(json.dumps(found[-1]) + "\n")
    return found


def held(source: Model, path: Path, tokenizer: Any, context: int, limit: int) -> Damage:
    """The measure of damage on the beginning of one text."""
    ids = tokenizer.encode(path.read_text(), add_special_tokens=False).ids
    inputs, targets = windows(ids[: limit + 1], context)
    return Damage(source, torch.cat([inputs, targets[:, -1:]], 1))


def entries(log: Path | None) -> list[Entry]:
    """What has been measured already."""
    return [json.loads(line) for line in log.read_text().splitlines()] if log is not None and log.exists() else []


def lines(args: argparse.Namespace, tasks: list[tuple[str, int, list[str]]]) -> Iterator[Entry]:
    """All lines, as they come."""
    if args.jobs < 2:
        for task in tasks:
            yield from work(args, *task)
        return
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        short_first = sorted(tasks, key=lambda task: len(task[2]))  # what is cheap is there even if the rest is not finished
        for done in as_completed([pool.submit(work, args, *task) for task in short_first]):
            yield from done.result()


def main() -> None:
    args = parse()
    common = {p.stem for p in args.calibration} & {p.stem for p in args.data}
    domains = sorted(common) if args.single_domain else [""]
    if not domains:
        sys.exit("--single-domain: no calibration text has the name of a text of --data")
    keeps, methods = [int(k) for k in args.keep.split(",")], SETS.get(args.methods) or args.methods.split(";")
    done = {(e.get("domain", ""), e["method"], e["keep"]) for e in entries(args.log)}
    parts = [(d, k, [m for m in chain if (d, m, k) not in done]) for k in keeps for chain in chains(methods) for d in domains]
    tasks = [(d, 0, ["none"]) for d in domains if (d, "none", "all") not in done] + [part for part in parts if part[2]]
    if args.work is not None:
        args.work.mkdir(parents=True, exist_ok=True)
    table = [*entries(args.log), *lines(args, tasks)]
    for domain in domains:
        print_table([e for e in table if e.get("domain", "") == domain], keeps, methods)


def print_table(table: list[Entry], keeps: list[int], methods: list[str]) -> None:
    """The lines of one domain, or of all: KL, perplexity and what that is more than before, of each text; the mean KL; exact match."""
    by_name = {(e["method"], e["keep"]): e for e in table}
    whole = by_name["none", "all"]
    cells = [f"{n}: KL, perplexity" for n in whole["found"]] + ["mean KL"] + (["exact match"] if "exact_match" in whole else [])
    print("\n| " + " | ".join(["method", "experts", *cells, "seconds"]) + " |")
    print("|---" * (len(cells) + 3) + "|")
    before = {n: Distance(**{k: v for k, v in d.items() if k != "perplexity"}) for n, d in whole["found"].items()}
    for entry in [whole] + [by_name[m, k] for k in keeps for m in methods if (m, k) in by_name]:
        found = entry["found"]
        cells = [
            f"{d['kl_divergence']:.3f}, {d['perplexity']:.2f} ({100 * (d['perplexity'] / before[n].perplexity - 1):+.1f} %)"
            for n, d in found.items()
        ]
        cells.append(f"{sum(d['kl_divergence'] for d in found.values()) / len(found):.4f}")
        if "exact_match" in entry:
            answered, right, asked = entry["exact_match"]
            cells.append(f"{right} of {asked} ({answered} answered)")
        print("| " + " | ".join([entry["method"], str(entry["keep"]), *cells, f"{entry['seconds']:.0f}"]) + " |", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--calibration", type=Path, nargs="+", required=True)
    parser.add_argument("--calibration-tokens", type=int, default=1 << 15)
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--keep", default="12,8,4")
    parser.add_argument(
        "--methods", default=";".join(m for m in METHODS if "task" not in m), help="separated by semicolons, or one of " + ", ".join(SETS)
    )
    parser.add_argument("--single-domain", action="store_true")
    parser.add_argument("--questions", type=Path, help="JSONL of prompt and answer, to search on")
    parser.add_argument("--task", type=Path, help="JSONL of prompt and answer, for exact match")
    parser.add_argument("-n", type=int, help="questions for exact match, from the beginning of the file; all unless given")
    parser.add_argument("--max-tokens", type=int, nargs="+", default=[2048], help="of each text, or one number for all")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--log", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
