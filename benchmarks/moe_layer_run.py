"""`python -m benchmarks.moe_layer run` and `sweep`: on the machine with the GPU."""

from __future__ import annotations

import json
import math
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch

from benchmarks.moe_layer import print_row, write_json
from benchmarks.moe_layer_build import Entry, format_of, read_plan
from benchmarks.moe_layer_peers import Peer, PeerWeights, load_peers
from moec.compiler.measure.cases import Index
from moec.compiler.measure.device import Ceilings, check_gpu, measure_ceilings, time_eager, time_graph, torch_stream
from moec.compiler.measure.layer import LayerWeights, Runner, Tokens, expected_result, random_tokens, random_weights, relative_error
from moec.compiler.measure.sweep import Bench, Results, rotated, run_sweep, summary, tasks
from moec.runtime.errors import MoecError
from moec.targets import get_target
from moec.targets.kernels.cuda.experts_layer import FP8, Layer
from moec.targets.measured import read_records

FEW, MANY = 8, 4  # layers in a graph
COLUMNS = ("shape", "format", "T", "kernel", "us", "of the floor", "GB/s", "TFLOP/s", "error", "options")


@dataclass(frozen=True)
class Row:
    """One line: times in microseconds; `share` is floor / us."""

    shape: str
    format: str
    tokens: int
    kernel: str
    us: float | None = None
    floor_us: float | None = None
    share: float | None = None
    gb_s: float | None = None
    tflop_s: float | None = None
    error: float | None = None
    options: str = ""
    why: str = ""
    problem: str = ""

    def show(self) -> None:
        """Print it."""
        cells = [self.shape, self.format, self.tokens, self.kernel]
        if self.problem:
            print_row([*cells, "", "", "", "", "", self.problem])
            return
        timed = ["", "", "", ""]
        if self.us is not None and self.share is not None:
            timed = [f"{self.us:.1f}", f"{self.share:.0%}", f"{self.gb_s:.0f}", f"{self.tflop_s:.1f}"]
        print_row([*cells, *timed, "" if self.error is None else f"{self.error:.1e}", self.options])


@dataclass
class Timing:
    """What is timed in a run: graphs of calls, and what they are compared with."""

    options: Namespace
    ceilings: Ceilings

    def inputs(self, layer: Layer, tokens: int) -> list[Tokens]:
        """The tokens of each layer of a graph."""
        count = FEW if tokens <= 8 else MANY
        return [random_tokens(layer, tokens, seed, self.options.skew, self.options.skipped) for seed in range(count)]

    def figures(self, us: float, weights: LayerWeights, inputs: Sequence[Tokens]) -> dict[str, float]:
        """What a time means."""
        layer = weights.layer
        nbytes = sum(weights.nbytes(tokens.ids) for tokens in inputs) / len(inputs)
        widths = torch.tensor(layer.widths or [layer.f] * layer.experts)
        used = (tokens.ids[(tokens.ids >= 0) & (tokens.ids < layer.experts)].cpu().long() for tokens in inputs)
        neurons = sum(int(widths[ids].sum()) for ids in used) / len(inputs)  # of all slots
        flop = 2 * neurons * (3 if layer.gated else 2) * layer.d
        floor = max(nbytes / self.ceilings.bandwidth / 1e3, flop / self.ceilings.bf16_tflop_s / 1e6)
        return {"us": us, "floor_us": floor, "share": floor / us, "gb_s": nbytes / us / 1e3, "tflop_s": flop / us / 1e6}


def run(options: Namespace) -> int:
    """Check and time what a plan has, layer by layer."""
    device = check_gpu()
    index, entries = Index.read(options.folder), read_plan(options.folder, options.shapes, options.formats, options.tokens)
    peers = load_peers(options.peer)
    ceilings = measure_ceilings()
    print(f"{device}, torch {torch.__version__}, kernels by TVM {index.tvm} for {index.target}, routing {options.skew}")
    print(f"copy {ceilings.copy_gb_s:.0f} GB/s, read {ceilings.read_gb_s:.0f} GB/s, bf16 product {ceilings.bf16_tflop_s:.0f} TFLOP/s\n")
    print_row(COLUMNS)
    print_row(["---"] * len(COLUMNS))
    timing = Timing(options, ceilings)
    rows: list[Row] = []
    for layer, of_layer in groupby(entries, key=lambda entry: (entry.case.layer, entry.case.biases)):
        for row in _layer(timing, index, *layer, list(of_layer), peers):
            row.show()
            rows.append(row)
            if options.json is not None:
                head = {"device": device, "torch": torch.__version__, "tvm": index.tvm, "ceilings": ceilings.to_json()}
                write_json(options.json, {**head, "skew": options.skew, "skipped": options.skipped, "rows": [asdict(row) for row in rows]})
    if not options.check:
        side_by_side(rows)
    bad = [row for row in rows if not row.kernel.startswith("peer") and (row.problem or not (row.error or 0) < _limit(row))]
    print(f"\n{len(rows)} rows, {len(bad)} of ours failed or are off" + "".join(f"\n  {r.shape} {r.format} T = {r.tokens}" for r in bad))
    return 1 if bad else 0


def side_by_side(rows: Sequence[Row]) -> None:
    """A table with a column for each T: microseconds, and the share of the floor in per cent."""
    columns = sorted({row.tokens for row in rows if row.us is not None})
    lines: dict[tuple[str, str, str], dict[int, str]] = {}
    for row in rows:
        if row.us is not None and row.share is not None:
            name = "moec" if row.kernel.startswith("moec") else row.kernel.removeprefix("peer ")
            lines.setdefault((row.shape, row.format, name), {})[row.tokens] = f"{row.us:.1f} ({100 * row.share:.0f})"
    print()
    print_row(("shape", "format", "kernel", *columns))
    print_row(["---"] * (3 + len(columns)))
    for key, cells in lines.items():
        print_row((*key, *(cells.get(t, "") for t in columns)))


def _limit(row: Row) -> float:
    """The most that a result may be off: E4M3 activations have 4 bits, bfloat16 8, two terms of it 16."""
    return 1e-4 if row.format.startswith("float32") else 5e-2 if row.format.startswith(f"{FP8}:") else 5e-3


def _layer(timing: Timing, index: Index, layer: Layer, biases: bool, entries: list[Entry], peers: Sequence[Peer]) -> Any:
    """The rows of a layer."""
    torch.cuda.empty_cache()
    count = 1 if timing.options.check else rotated(layer)
    weights = [random_weights(layer, seed, biases) for seed in range(count)]
    given: list[PeerWeights] = [PeerWeights(w) for w in weights]
    for entry in entries:
        row = partial(Row, entry.shape, format_of(layer), entry.tokens)
        yield _ours(timing, index, entry, weights, row)
        if timing.options.check or biases or not entry.tokens:
            continue
        for peer in peers:
            if (found := _peer(timing, peer, given, entry.tokens, row)) is not None:
                yield found


def _ours(timing: Timing, index: Index, entry: Entry, weights: Sequence[LayerWeights], row: Callable[..., Row]) -> Row:
    """The row of our kernels."""
    case, layer = entry.case, entry.case.layer
    name, shown = f"moec {case.kernel}", json.dumps(dict(case.options))
    if case not in index.files:
        return row(name, problem="not built")
    try:
        runner = Runner.load(timing.options.folder, case, index.files[case], entry.tokens)
        error = check(runner, weights[0])
        if timing.options.check or not entry.tokens:
            return row(name, error=error, options=shown, why=entry.why)
        inputs = timing.inputs(layer, entry.tokens)
        calls = [runner.bind(weights[i % len(weights)], tokens) for i, tokens in enumerate(inputs)]
        us = time_graph(calls, timing.options.repetitions, runner.ffi)
    except (RuntimeError, ValueError, MoecError) as problem:
        return row(name, options=shown, problem=f"{type(problem).__name__}: {str(problem)[:200]}")
    return row(name, **timing.figures(us, weights[0], inputs), error=error, options=shown, why=entry.why)


def check(runner: Runner, weights: LayerWeights) -> float:
    """The worst relative error over routings; nan if a result is not finite."""
    errors = []
    for tokens in routings(runner.case.layer, runner.tokens):
        runner.poison()
        with torch_stream(runner.ffi):
            found = runner.bind(weights, tokens)()
        torch.cuda.synchronize()
        errors.append(relative_error(found, expected_result(weights, tokens, runner.case.activation)))
    return next((error for error in errors if math.isnan(error)), max(errors))


def routings(layer: Layer, count: int) -> list[Tokens]:
    """As drawn; skewed, with slots that run nothing and ids out of range; one expert for all tokens, which the first runs twice."""
    found = [random_tokens(layer, count, 0)]
    if not count:
        return found
    odd = random_tokens(layer, count, 1, "zipf")
    odd.ids[0, 0], odd.ids[-1, -1] = -1, layer.experts
    if count > 2:
        odd.ids[1] = layer.experts + 7  # a token without experts
    one = random_tokens(layer, count, 2)
    one.ids[:] = torch.arange(layer.top_k, device=one.ids.device)
    one.ids[0, -1] = 0
    return [*found, odd, one]


def _peer(timing: Timing, peer: Peer, weights: Sequence[PeerWeights], tokens: int, row: Callable[..., Row]) -> Row | None:
    """The row of another library; None if it does not do this layer."""
    layer = weights[0].layer
    inputs = timing.inputs(layer, tokens)
    try:
        calls = []
        for i, t in enumerate(inputs):
            if (call := peer.layer(weights[i % len(weights)], t.x, t.ids, t.routing_weights)) is None:
                return None
            calls.append(call)
        error = relative_error(calls[0](), expected_result(weights[0].ours, inputs[0]))
        how = "graph"
        try:
            us = time_graph(calls, timing.options.repetitions)
        except RuntimeError:
            how, us = "no graph", time_eager(calls, timing.options.repetitions)
    except Exception as problem:  # noqa: BLE001  # a stranger's code may raise anything
        return row(f"peer {peer.name}", problem=f"{type(problem).__name__}: {str(problem)[:200]}")
    figures = timing.figures(us, weights[0].ours, inputs)
    if peer.bits is not None:  # its floor is of its own bytes
        own = figures["gb_s"] * peer.bits / _bits(layer)
        floor = max(figures["floor_us"] * peer.bits / _bits(layer), figures["tflop_s"] * us / timing.ceilings.bf16_tflop_s)
        figures |= {"gb_s": own, "floor_us": floor, "share": floor / us}
    return row(f"peer {peer.name}", **figures, error=error, options=how)


def _bits(layer: Layer) -> float:
    """Bits of a weight, scales counted."""
    neurons = sum(layer.widths) or layer.experts * layer.f
    return 8 * layer.layout.nbytes() / (neurons * (3 if layer.gated else 2) * layer.d)


def sweep(options: Namespace) -> int:
    """Time all candidates that were built, and keep the records."""
    device = check_gpu()
    index = Index.read(options.folder)
    entries = read_plan(options.folder, options.shapes, options.formats, None)
    layers = list(dict.fromkeys(entry.case.layer for entry in entries))
    counts = sorted({entry.tokens for entry in entries if entry.tokens})
    counts = counts if options.tokens is None else [int(t) for t in options.tokens.split(",")]
    results = Results(options.records, index.target, device, index.tvm, measure_ceilings())
    target = get_target(index.target)
    wanted = [task for task in tasks(layers, counts, target, read_records(index.target), every=True) if task.case in index.files]
    bench = Bench(options.folder, index, options.repetitions)
    print(f"{device}: {len(wanted)} timings, {sum(results.has(task) for task in wanted)} of them done", flush=True)
    for done, (task, us, problem) in enumerate(run_sweep(wanted, results, bench.measure, options.seconds), 1):
        if us is None:
            print(f"{task.case.layer.name} {task.kernel} T = {task.tokens} {dict(task.case.options)}: {problem}", flush=True)
        elif done % 50 == 0:
            print(f"{done} timings", flush=True)
    print_row(("layer", "kernel", "T", "us", "over the default", "of", "options"))
    print_row(["---"] * 7)
    for layer in layers:
        for r in summary(results.record(layer), target):
            print_row((r["layer"], r["kernel"], r["tokens"], r["us"], r["gain"], r["tried"], r["options"]))
    return 0
