"""`moec targets measure` on a GPU that is made up: what is built and timed, in how much time, what goes on later, and what it says."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moec.compiler.cli.targets import app
from moec.compiler.measure import here
from moec.compiler.measure.cases import Case, Index
from moec.compiler.measure.device import Ceilings
from moec.compiler.measure.here import Found, Sweep, measure_here
from moec.compiler.measure.sweep import MOST, Task, tasks
from moec.compiler.progress import Progress
from moec.targets import Target, get_target
from moec.targets.kernels.cuda.experts_layer import Layer
from moec.targets.kernels.cuda.space import candidates, default
from moec.targets.kernels.cuda.tuned import choose

LAYER = Layer(8, 2, 512, 384, "int4_g64", "int4_g64", "float32")
TARGET = get_target("h100-sxm")


class Box:
    """A GPU on which a kernel takes a second to build, and as long to time."""

    def __init__(self) -> None:
        self.now, self.built, self.timed = 0.0, list[Case](), list[Task]()

    def build(self, folder: Path, cases: Sequence[Case], target: Target, jobs: int) -> Iterator[tuple[Case, str | None]]:
        del jobs
        new = [case for case in dict.fromkeys(cases) if case not in self.built]
        for case in new:
            self.now += 1.0
            self.built.append(case)
            yield case, "ptxas says no" if dict(case.options).get("down_warps") == 32 else None
        Index(target.name, "sm_90a", "0.27", {}, dict.fromkeys(cases, "x")).write(folder)

    def measure(self, task: Task) -> tuple[float, float | None]:
        self.now += 1.0
        self.timed.append(task)
        first = dict(task.case.options) == default(task.kernel, LAYER, task.tokens)
        return 20.0 if first else 10.0 + len(self.timed) / 1000, 1e-4 if task.kernel == "prefill" else None


@pytest.fixture
def box(monkeypatch: pytest.MonkeyPatch) -> Box:
    made = Box()
    monkeypatch.setattr(here, "check_gpu", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(here, "measure_ceilings", lambda: Ceilings(3000.0, 2900.0, 700.0))
    monkeypatch.setattr(here, "tvm_version", lambda: "0.27")
    monkeypatch.setattr(here, "build", made.build)
    monkeypatch.setattr(here, "Bench", lambda work, index: made)
    monkeypatch.setattr("moec.compiler.measure.here.time.monotonic", lambda: made.now)
    monkeypatch.setattr("torch.cuda.synchronize", lambda: None)
    return made


def sweep(folder: Path, seconds: float = 1e6, every: bool = False) -> Found:
    return measure_here(Sweep([LAYER], (1, 8, 64), None, folder, seconds, 2, every), Progress(io.StringIO()))


def test_few_kernels_of_a_new_layer_are_built(box: Box, tmp_path: Path) -> None:
    found = sweep(tmp_path)
    wanted = tasks([LAYER], (1, 8, 64), TARGET)
    assert found.left == 0
    assert len(box.timed) + len(found.failed) == len(wanted) <= 6 * MOST
    assert len(box.built) == found.compiled == len({task.case for task in wanted})  # those of many tokens once for all T
    assert found.compiled < len({task.case for task in tasks([LAYER], (1, 8, 64), TARGET, every=True)})
    assert {why for _, why in found.failed} == {"ptxas says no"}
    assert choose(TARGET, LAYER, 64, [tmp_path]).measured


def test_all_candidates_are_more(box: Box, tmp_path: Path) -> None:
    sweep(tmp_path, every=True)
    assert len([t for t in box.timed if (t.kernel, t.tokens) == ("prefill", 64)]) == len(candidates("prefill", LAYER, 64)) > MOST


def test_time_is_a_limit_and_what_is_left_comes_later(box: Box, tmp_path: Path) -> None:
    first = sweep(tmp_path, seconds=12)
    assert first.left > 0
    assert sum(first.seconds) <= 12 + here.BATCH * 2 + 1  # a batch that is being built is finished
    done = len(box.timed)
    second = sweep(tmp_path)
    assert second.left == 0
    assert len(box.timed) == len(set(box.timed)) > done  # nothing twice


def test_what_it_says(box: Box, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moec.compiler.measure.layers.layers_of", lambda *_: [LAYER])
    arguments = ["measure", "--tokens", "1,64", "--output", str(tmp_path), "--jobs", "2"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert f"| {LAYER.name} | decode | 1 | " in done.output
    assert "times as fast as with defaults on average" in done.output
    again = CliRunner().invoke(app, [*arguments, "--json"])
    values = json.loads(again.stdout[again.stdout.index("{") :])
    gains = {(row["kernel"], row["tokens"]): row["gain"] for row in values["best"]}
    assert gains["decode", 1] > 1.9
    assert gains["prefill", 64] > 1.9
    assert values["left"] == 0
    assert box.timed
