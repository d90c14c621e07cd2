"""Measuring on this machine: kernels are compiled a batch at a time, and each batch is timed before the next."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from moec.compiler.errors import MoecError
from moec.compiler.measure.build import build, tvm_version
from moec.compiler.measure.cases import Index
from moec.compiler.measure.device import check_gpu, measure_ceilings
from moec.compiler.measure.sweep import Bench, Results, Task, run_sweep, tasks
from moec.compiler.progress import Progress
from moec.targets import Target, get_target, known_targets
from moec.targets.kernels.cuda.space import Layer
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


def measure_here(
    layers: Sequence[Layer],
    target: Target | None,
    tokens: Sequence[int],
    folder: Path | None,
    seconds: float,
    jobs: int,
    progress: Progress,
) -> tuple[list[Record], list[tuple[Task, str]], int]:  # fmt: skip
    """Sweep the kernels of some layers on this machine's GPU, until all is measured or the time is up.

    Args:
        target: the GPU; found by its name unless given.
        folder: where records are; the user's own unless given.
        seconds: after which no new timing begins.
        jobs: processes that compile.

    Returns:
        The records, the tasks that failed and why, and how many are left.

    Raises:
        MoecError: there is no GPU, no compiler, or no target for the GPU.
    """
    device = check_gpu()
    target = target or target_of(device)
    start = time.monotonic()
    with progress.step("what the GPU reaches"):
        ceilings = measure_ceilings()
    results = Results(folder or own_folder(), target.name, device, tvm_version(), ceilings)
    known = [record for record in read_records(target.name) if Layer.from_json(record.layer) not in layers]
    wanted = tasks(layers, tokens, target, known)
    failed: list[tuple[Task, str]] = []
    with tempfile.TemporaryDirectory(prefix="moec-measure-") as work, progress.counter("timings") as count:
        left = [task for task in wanted if not results.has(task)]
        done = len(wanted) - len(left)
        for batch in _batches(left, BATCH * jobs):
            if time.monotonic() - start > seconds:
                break
            measure = _compiled(Path(work), batch, target, jobs)
            for task, us, problem in run_sweep(batch, results, measure, seconds - (time.monotonic() - start)):
                done += 1
                count(done, len(wanted))
                if us is None:
                    failed.append((task, problem))
    bad = {task for task, _ in failed}
    remaining = sum(task not in bad and not results.has(task) for task in wanted)
    return [results.record(layer) for layer in layers], failed, remaining


def _batches(wanted: Sequence[Task], size: int) -> Iterator[Sequence[Task]]:
    for begin in range(0, len(wanted), size):
        yield wanted[begin : begin + size]


def _compiled(work: Path, batch: Sequence[Task], target: Target, jobs: int) -> Callable[[Task], tuple[float, float | None]]:
    """What times a task of a batch, whose libraries it compiles."""
    problems = dict(build(work, [task.case for task in batch], target, jobs))
    bench = Bench(work, Index.read(work))

    def measure(task: Task) -> tuple[float, float | None]:
        if (problem := problems.get(task.case)) is not None:
            raise ValueError(problem)
        return bench.measure(task)

    return measure
