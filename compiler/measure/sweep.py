"""A sweep: every candidate of a layer's kernels is timed, and what came out is kept in records. It goes on where it was interrupted.

First the few candidates that did best for other layers are timed for every kernel and T, then the rest, so that a sweep that is short
of time has found most of what there is.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from moec.compiler.measure.cases import KERNELS, Case, Index
from moec.compiler.measure.device import Ceilings, time_graph, torch_stream
from moec.compiler.measure.layer import LayerWeights, Runner, Tokens, expected_result, random_tokens, random_weights, relative_error
from moec.targets import Target
from moec.targets.kernels.cuda.experts_layer import Layer
from moec.targets.kernels.cuda.family import FAMILIES, FAMILY, fingerprint
from moec.targets.kernels.cuda.space import MOST_DECODE, candidates, default, has_many, limits
from moec.targets.kernels.cuda.tuned import order
from moec.targets.measured import Measurement, Record, read_record, write_record

FIRST = 4
"""Candidates of a kernel in the first round."""

MOST = 8
"""Candidates of a kernel and T, unless all are asked for: in the records of an H100 the best one was always among so many."""

SAME = 2e-2
"""How far candidates of one kernel may differ, relative to each other."""

DECODE_CALLS, PREFILL_CALLS = 12, 4
"""Calls in a graph."""


@dataclass(frozen=True)
class Task:
    """One timing that is wanted."""

    kernel: str
    tokens: int
    case: Case

    @property
    def group(self) -> tuple[Layer, str, int]:
        """Tasks that have the same inputs."""
        return self.case.layer, self.kernel, self.tokens


def tasks(layers: Sequence[Layer], tokens: Sequence[int], target: Target, known: Sequence[Record] = (), every: bool = False) -> list[Task]:
    """What a sweep times, in its order: the kernels of few tokens where T is at most `MOST_DECODE`, those of many for every T from there.

    Args:
        target: what is left out is what it cannot run.
        known: records of other layers, which order the candidates.
        every: all candidates, and not the most promising ones only.
    """
    many = ("prefill",) if has_many(target) else ()
    rounds: tuple[list[Task], list[Task]] = ([], [])
    for layer in layers:
        for t in tokens:
            kernels = (*(("gate_up", "down") if t <= MOST_DECODE else ()), *(many if t >= MOST_DECODE else ()))
            for kernel in kernels:
                found = candidates(kernel, layer, t, *limits(target))
                ordered = [found[0], *order(known, kernel, layer, t, found[1:])]
                for place, options in enumerate(ordered if every else ordered[:MOST]):
                    rounds[place >= FIRST].append(Task(kernel, t, Case.of(kernel, layer, options, t)))
    return [*rounds[0], *rounds[1]]


class Results:
    """The records of a sweep in a folder, one a layer; each is written after each timing.

    Args:
        folder: has a folder a target.
        target: its name.
        device, tvm, ceilings: as in `Record`.
    """

    def __init__(self, folder: Path, target: str, device: str, tvm: str, ceilings: Ceilings) -> None:
        self._folder, self._records = folder / target, dict[Layer, Record]()
        self._new = Record(target, "experts", {}, device, tvm, {}, ceilings.to_json())

    def path(self, layer: Layer) -> Path:
        """Where the record of a layer is."""
        return self._folder / f"{layer.name}.json"

    def record(self, layer: Layer) -> Record:
        """The record of a layer, without what other versions of TVM or of the kernels gave, or another GPU."""
        if layer not in self._records:
            now = {family: fingerprint(family) for family in FAMILIES}
            new = replace(self._new, layer=layer.to_json(), kernels=now)
            if self.path(layer).is_file():
                old = read_record(self.path(layer))
                if (old.device, old.tvm) == (new.device, new.tvm):
                    kept = [m for m in old.measurements if old.kernels.get(FAMILY[m.kernel]) == now[FAMILY[m.kernel]]]
                    new = replace(new, measurements=tuple(kept))
            self._records[layer] = new
        return self._records[layer]

    def has(self, task: Task) -> bool:
        """Whether a task was done, by this sweep or an earlier one."""
        done = {(m.kernel, m.tokens, m.options) for m in self.record(task.case.layer).measurements}
        return (task.kernel, task.tokens, task.case.options) in done

    def add(self, task: Task, us: float, error: float | None) -> None:
        """Keep a timing."""
        layer = task.case.layer
        self._records[layer] = self.record(layer).add(Measurement(task.kernel, task.tokens, task.case.options, us, error))
        write_record(self.path(layer), self._records[layer])


class Bench:
    """The inputs of the group of tasks that is being timed, and what its candidates should give."""

    def __init__(self, folder: Path, index: Index, repetitions: int = 9) -> None:
        self._folder, self._index, self._repetitions = folder, index, repetitions
        self._weights: tuple[Layer, list[LayerWeights]] | None = None
        self._inputs: tuple[tuple[Layer, str, int], list[Tokens]] | None = None
        self._expected: Tensor | None = None

    def measure(self, task: Task) -> tuple[float, float | None]:
        """Microseconds of a call, and its error where it is known: relative to float64 for whole layers.

        Raises:
            ValueError: the candidate is wrong: it gives another result than the first candidate did.
        """
        weights, inputs = self._prepare(task)
        runner = Runner.load(self._folder, task.case, self._index.files[task.case], task.tokens)
        _fill_hidden(task, runner)
        with torch_stream(runner.ffi):
            runner.bind(weights[0], inputs[0])()
        torch.cuda.synchronize()
        error = self._check(task, runner, weights[0], inputs[0])
        calls = [runner.bind(weights[i % len(weights)], tokens) for i, tokens in enumerate(inputs)]
        return time_graph(calls, self._repetitions, runner.ffi), error

    def _prepare(self, task: Task) -> tuple[list[LayerWeights], list[Tokens]]:
        layer = task.case.layer
        if self._weights is None or self._weights[0] != layer:
            self._weights = None
            torch.cuda.empty_cache()
            self._weights = layer, [random_weights(layer, seed) for seed in range(rotated(layer))]
        if self._inputs is None or self._inputs[0] != task.group:
            count = PREFILL_CALLS if task.kernel == "prefill" else DECODE_CALLS
            self._inputs, self._expected = (task.group, [random_tokens(layer, task.tokens, seed) for seed in range(count)]), None
        return self._weights[1], self._inputs[1]

    def _check(self, task: Task, runner: Runner, weights: LayerWeights, tokens: Tokens) -> float | None:
        if task.kernel == "prefill":
            if self._expected is None:
                self._expected = expected_result(weights, tokens)
            error = relative_error(runner.buffers["out"], self._expected)
            if not error < max(SAME, task.case.layer.most_error):
                raise ValueError(f"relative error {error:.1e}")
            return error
        found = runner.buffers["out" if task.kernel == "down" else "hidden"]
        values = (found.view(torch.bfloat16) if task.kernel == "gate_up" else found).double()
        if values.isnan().any():
            raise ValueError("a result that is not a number")
        if self._expected is None:
            self._expected = values.clone()
        elif not relative_error(values, self._expected) < SAME:
            raise ValueError(f"another result than the first candidate's: {relative_error(values, self._expected):.1e}")
        return None


def rotated(layer: Layer) -> int:
    """Sets of weights that take turns, so that none is in the L2 cache when it is read: as many as 3 GB hold, 2 to 8."""
    return max(2, min(8, int(3e9 // layer.layout.nbytes())))


def _fill_hidden(task: Task, runner: Runner) -> None:
    """What `down` alone reads: the same for every candidate."""
    if task.kernel == "down":
        hidden = runner.buffers["hidden"].view(torch.bfloat16)
        generator = torch.Generator(hidden.device).manual_seed(7)
        hidden.copy_(torch.randn(hidden.shape, device=hidden.device, generator=generator))


def run_sweep(
    wanted: Sequence[Task], results: Results, measure: Callable[[Task], tuple[float, float | None]], seconds: float | None
) -> Iterator[tuple[Task, float | None, str]]:
    """Do what is not done, until it is or the time is up: each task with its microseconds, or None and what went wrong.

    Tasks of one group in a round follow each other, since they have the same inputs.
    """
    start = time.monotonic()
    for task in wanted:
        if seconds is not None and time.monotonic() - start > seconds:
            return
        if results.has(task):
            continue
        try:
            us, error = measure(task)
        except (ValueError, RuntimeError, KeyError) as problem:  # a candidate that cannot run is none
            torch.cuda.synchronize()  # raises if the device is lost: then nothing that follows would be true
            yield task, None, str(problem).strip().splitlines()[-1][:200] if str(problem).strip() else type(problem).__name__
            continue
        results.add(task, us, error)
        yield task, us, ""


def summary(record: Record, target: Target) -> list[Mapping[str, object]]:
    """For each kernel and T: the best options, and how much longer the defaults take; both kernels of few tokens are `decode`."""
    layer = Layer.from_json(record.layer)
    groups: dict[tuple[str, int], list[Measurement]] = {}
    for m in record.measurements:
        if m.error is None or m.error < layer.most_error:
            groups.setdefault((m.kernel, m.tokens), []).append(m)
    rows: list[Mapping[str, object]] = []
    times: dict[int, list[tuple[float, float]]] = {}
    for (kernel, tokens), found in groups.items():
        best = min(found, key=lambda m: m.us)
        first = tuple(sorted(default(kernel, layer, tokens, *limits(target)).items()))
        plain = next((m.us for m in found if m.options == first), None)
        rows.append(_row(layer, kernel, tokens, best.us, plain, len(found), json.dumps(dict(best.options))))
        if kernel in KERNELS["decode"] and plain is not None:
            times.setdefault(tokens, []).append((best.us, plain))
    both = {tokens: pairs for tokens, pairs in times.items() if len(pairs) == len(KERNELS["decode"])}
    for tokens, pairs in both.items():
        us, plain = (sum(column) for column in zip(*pairs, strict=True))
        rows.append(_row(layer, "decode", tokens, us, plain, 0, ""))
    return rows


def _row(layer: Layer, kernel: str, tokens: int, us: float, plain: float | None, tried: int, options: str) -> Mapping[str, object]:
    gain = None if plain is None else round(plain / us, 3)
    head = {"layer": layer.name, "kernel": kernel, "tokens": tokens, "us": us, "options": options}
    return {**head, "default_us": plain, "gain": gain, "tried": tried}
