"""Measuring on this machine: kernels are compiled a batch at a time, and each batch is timed before the next."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moec.compiler.errors import MoecError
from moec.compiler.measure.build import build, tvm_version
from moec.compiler.measure.cases import Case, Index
from moec.compiler.measure.device import check_gpu, measure_ceilings
from moec.compiler.measure.sweep import Bench, Results, Task, run_sweep, tasks
from moec.compiler.progress import Progress
from moec.targets import Target, get_target, known_targets
from moec.targets.kernels.cuda.experts_layer import Layer
from moec.targets.measured import Record, own_folder, read_records

TOKENS = (1, 2, 4, 8, 16, 64, 256, 1024, 4096)
BATCH = 4
"""Libraries of a batch, for each process that compiles."""


def target_of(device: str) -> Target:
    """The target that a GPU is, by the words of its name.

    >>> target_of("NVIDIA H100 80GB HBM3").name, target_of("NVIDIA GeForce RTX 4090").name
    ('h100-sxm', 'rtx-4090')

    Raises:
        MoecError: none has that name.
    """
    words = set(re.findall(r"[a-z0-9]+", device.lower()))
    targets = [target for name in known_targets() if (target := get_target(name)).kind == "cuda"]
    fitting = [t for t in targets if set(t.name.removesuffix("-sxm").removesuffix("-80g").split("-")) <= words]
    if len(fitting) != 1:
        names = ", ".join(target.name for target in targets)
        raise MoecError(f"no target is a {device!r}: name one with --target ({names}), or a file that describes it")
    return fitting[0]


@dataclass(frozen=True)
class Sweep:
    """What a sweep is to do.

    Args:
        layers, tokens: what is measured.
        target: the GPU; found by its name unless given.
        folder: where records are; the user's own unless given.
        seconds: after which nothing new begins.
        jobs: processes that compile.
        every: all candidates, and not the most promising ones only.
    """

    layers: Sequence[Layer]
    tokens: Sequence[int] = TOKENS
    target: Target | None = None
    folder: Path | None = None
    seconds: float = 600
    jobs: int = 1
    every: bool = False


@dataclass(frozen=True)
class Found:
    """What it found: the records, the tasks that failed and why, how many are left, and the seconds that compiling and timing took."""

    target: Target
    records: Sequence[Record]
    failed: Sequence[tuple[Task, str]]
    left: int
    compiled: int
    seconds: tuple[float, float]


def measure_here(sweep: Sweep, progress: Progress) -> Found:
    """Sweep the kernels of some layers on this machine's GPU, until all is measured or the time is up.

    Raises:
        MoecError: there is no GPU, no compiler, or no target for the GPU.
    """
    device, start = check_gpu(), time.monotonic()
    target = sweep.target or target_of(device)
    with progress.step("what the GPU reaches"):
        ceilings = measure_ceilings()
    results = Results(sweep.folder or own_folder(), target.name, device, tvm_version(), ceilings)
    known = [record for record in read_records(target.name) if Layer.from_json(record.layer) not in sweep.layers]
    wanted = tasks(sweep.layers, sweep.tokens, target, known, sweep.every)
    failed: list[tuple[Task, str]] = []
    built, building, timing = 0, 0.0, 0.0
    with tempfile.TemporaryDirectory(prefix="moec-measure-") as work, progress.counter("kernels and timings") as count:
        left = [task for task in wanted if not results.has(task)]
        cases = len({task.case for task in left})
        total, done = cases + len(wanted), len(wanted) - len(left)
        for batch in _batches(left, BATCH * sweep.jobs):
            begun = time.monotonic()
            if begun - start > sweep.seconds:
                break
            problems = dict[Case, str | None]()
            for case, problem in build(Path(work), [task.case for task in batch], target, sweep.jobs):
                problems[case], built = problem, built + 1
                count(built + done, total)
            building += time.monotonic() - begun
            begun = time.monotonic()
            for task, us, problem in run_sweep(batch, results, _measure(Path(work), problems), sweep.seconds - (begun - start)):
                done += 1
                count(built + done, total)
                if us is None:
                    failed.append((task, problem))
            timing += time.monotonic() - begun
    bad = {task for task, _ in failed}
    remaining = sum(task not in bad and not results.has(task) for task in wanted)
    return Found(target, [results.record(layer) for layer in sweep.layers], failed, remaining, built, (building, timing))


def _batches(wanted: Sequence[Task], size: int) -> Iterator[Sequence[Task]]:
    """Some tasks after the other, those of a batch with at most `size` libraries."""
    batch: list[Task] = []
    for task in wanted:
        if len({*(t.case for t in batch), task.case}) > size:
            yield batch
            batch = []
        batch.append(task)
    if batch:
        yield batch


def _measure(work: Path, problems: Mapping[Case, str | None]) -> Callable[[Task], tuple[float, float | None]]:
    """What times a task, whose library is built."""
    bench = Bench(work, Index.read(work))

    def measure(task: Task) -> tuple[float, float | None]:
        if (problem := problems.get(task.case)) is not None:
            raise ValueError(problem)
        return bench.measure(task)

    return measure
