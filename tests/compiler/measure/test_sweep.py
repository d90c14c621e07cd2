"""The sweep with timings that are made up: order, resuming, time, failures, and what it keeps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from moec.compiler.errors import MoecError
from moec.compiler.measure.cases import Case, Index
from moec.compiler.measure.device import Ceilings, check_gpu
from moec.compiler.measure.here import target_of
from moec.compiler.measure.layers import layers_of, make_layer
from moec.compiler.measure.sweep import FIRST, Results, Task, run_sweep, summary, tasks
from moec.compiler.text import parse_graph
from moec.targets import Target, cuda, get_target
from moec.targets.kernels.cuda.experts_layer import Layer
from moec.targets.kernels.cuda.space import candidates, default
from moec.targets.kernels.cuda.tuned import choose
from moec.targets.measured import read_record
from tests import graphs

BOX = Target("box", "a GPU of ours", "cuda", cuda("sm_90a", 232_448))
LAYER = Layer(8, 2, 512, 384, "int4_g64", "int4_g64")
WANTED = tasks([LAYER], [1, 8, 64], BOX, every=True)
CEILINGS = Ceilings(3000.0, 2900.0, 700.0)


@pytest.fixture(autouse=True)
def _no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


def results(folder: Path, tvm: str = "0.27", device: str = "GPU") -> Results:
    return Results(folder, "box", device, tvm, CEILINGS)


def microseconds(task: Task) -> tuple[float, float | None]:
    """Fewer for options whose values are larger."""
    return 1e4 / sum(value for _, value in task.case.options), 2e-3 if task.kernel == "prefill" else None


def test_tasks_are_all_candidates_the_promising_ones_of_each_kernel_first() -> None:
    groups = {task.group for task in WANTED}
    kernels = {(kernel, tokens) for _, kernel, tokens in groups}
    assert kernels == {("gate_up", 1), ("down", 1), ("gate_up", 8), ("down", 8), ("prefill", 8), ("prefill", 64)}
    for kernel, tokens in kernels:
        own = [task for task in WANTED if (task.kernel, task.tokens) == (kernel, tokens)]
        expected = candidates(kernel, LAYER, tokens)
        assert sorted(str(dict(t.case.options)) for t in own) == sorted(str(dict(sorted(o.items()))) for o in expected)
        assert dict(own[0].case.options) == default(kernel, LAYER, tokens)
    first = sum(min(FIRST, len(candidates(kernel, LAYER, tokens))) for kernel, tokens in kernels)
    assert {task.group for task in WANTED[:first]} == groups


def test_older_gpus_have_no_tasks_of_many_tokens() -> None:
    few, old = {("gate_up", 1), ("down", 1)}, Target("old", "a GPU without mma on bfloat16", "cuda", cuda("sm_75", 64 << 10))
    assert {(task.kernel, task.tokens) for task in tasks([LAYER], [1, 64], old)} == few
    found = tasks([LAYER], [1, 64], get_target("a100"))
    assert {(task.kernel, task.tokens) for task in found} == few | {("prefill", 64)}
    assert not any(dict(task.case.options).get("cluster") for task in found)


def test_all_is_kept_and_chosen_from(tmp_path: Path) -> None:
    found = results(tmp_path)
    assert len(list(run_sweep(WANTED, found, microseconds, None))) == len(WANTED)
    record = read_record(found.path(LAYER))
    assert len(record.measurements) == len(WANTED)
    assert record.ceilings == CEILINGS.to_json()
    choice = choose(BOX, LAYER, 1, [tmp_path])
    best = max(candidates("gate_up", LAYER, 1), key=lambda o: sum(o.values()))
    assert {name: choice.options[name] for name in best} == best
    assert choice.why == "measured on GPU"
    rows = summary(record, BOX)
    assert [row["kernel"] for row in rows].count("decode") == 2
    assert len(rows) == 8
    assert all(isinstance(row["gain"], float) and row["gain"] >= 1 for row in rows)


def test_an_interrupted_sweep_goes_on(tmp_path: Path) -> None:
    for i, _ in enumerate(run_sweep(WANTED, results(tmp_path), microseconds, None)):
        if i == 10:
            break
    assert len(list(run_sweep(WANTED, results(tmp_path), microseconds, None))) == len(WANTED) - 11
    assert not list(run_sweep(WANTED, results(tmp_path), microseconds, None))


def test_other_versions_are_measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def left(found: Results) -> Sequence[Task]:
        return [task for task in WANTED if not found.has(task)]

    list(run_sweep(WANTED, results(tmp_path), microseconds, None))
    assert left(results(tmp_path)) == []
    assert left(results(tmp_path, tvm="0.28")) == WANTED
    assert left(results(tmp_path, device="another")) == WANTED
    monkeypatch.setattr("moec.compiler.measure.sweep.fingerprint", lambda family: {"prefill": "new"}.get(family) or _real(family))
    assert {task.kernel for task in left(results(tmp_path))} == {"prefill"}


def _real(family: str) -> str:
    from moec.targets.kernels.cuda.family import fingerprint

    return fingerprint(family)


def test_time_is_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10**6))
    monkeypatch.setattr("moec.compiler.measure.sweep.time.monotonic", lambda: float(next(clock)))
    assert len(list(run_sweep(WANTED, results(tmp_path), microseconds, 5))) == 5


def test_a_candidate_that_fails_is_said_and_left_out(tmp_path: Path) -> None:
    def broken(task: Task) -> tuple[float, float | None]:
        if task.kernel == "down":
            raise ValueError("relative error 3.0e-01")
        return microseconds(task)

    found = results(tmp_path)
    failed = [(task, why) for task, us, why in run_sweep(WANTED, found, broken, None) if us is None]
    assert {task.kernel for task, _ in failed} == {"down"}
    assert {why for _, why in failed} == {"relative error 3.0e-01"}
    assert not any(m.kernel == "down" for m in found.record(LAYER).measurements)


def test_an_index_is_read_as_written(tmp_path: Path) -> None:
    mixed = make_layer((4, 2, 256, 128, True), "int2_g64+int4_g64/int8_g64", "float32")
    files = {Case.of("decode", mixed, default("decode", mixed, 2), 2, biases=True): "a", WANTED[0].case: "b"}
    index = Index("h100-sxm", "sm_90a", "0.27", {"decode": "1"}, files)
    index.write(tmp_path)
    assert Index.read(tmp_path) == index
    with pytest.raises(MoecError, match="moe_layer build"):
        Index.read(tmp_path / "none")


def test_names_of_files_change_with_what_they_are_made_of() -> None:
    case = WANTED[0].case
    names = {case.file_name("sm_90a", "0.27"), case.file_name("sm_80", "0.27"), case.file_name("sm_90a", "0.28"),
             WANTED[1].case.file_name("sm_90a", "0.27")}  # fmt: skip
    assert len(names) == 4


@pytest.mark.parametrize(
    ("device", "target"),
    [("NVIDIA H100 80GB HBM3", "h100-sxm"), ("NVIDIA H200", "h200-sxm"), ("NVIDIA A100-SXM4-80GB", "a100-80g"), ("NVIDIA L4", "l4"),
     ("NVIDIA GeForce RTX 5090", "rtx-5090")],
)  # fmt: skip
def test_gpus_are_known_by_their_names(device: str, target: str) -> None:
    assert target_of(device).name == target


@pytest.mark.parametrize("device", ["NVIDIA L40S", "NVIDIA GeForce RTX 4080"])
def test_other_gpus_need_a_target(device: str) -> None:
    with pytest.raises(MoecError, match="--target"):
        target_of(device)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, [], ["int4_g64"], "bfloat16"), "nothing to measure"),
        ((None, ["4,2,256"], ["int4_g64"], "bfloat16"), "E,K,D,F"),
        ((None, ["4,8,256,128"], ["int4_g64"], "bfloat16"), "K from 1 to E"),
        ((None, ["4,2,256,128"], ["int4_g48"], "bfloat16"), "groups of 48"),
        ((None, ["4,2,256,128"], ["a/b/c"], "bfloat16"), "expected one, or two"),
        ((None, ["4,2,256,128"], ["int4_g64"], "float16"), "--activations"),
    ],
)
def test_wrong_layers_are_refused(arguments: tuple[None, list[str], list[str], str], message: str) -> None:
    with pytest.raises(MoecError, match=message):
        layers_of(*arguments)


def test_layers_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = parse_graph(graphs.MOE.replace("[6, 24, 16]", "[6, 48, 16]").replace("[6, 16, 12]", "[6, 16, 24]"))
    monkeypatch.setattr("moec.compiler.frontend.huggingface.load", lambda _: (graph, None))
    found = layers_of("a folder", ["64,8,2048,1024"], ["int4_g64", "int2_g64/int8_g64"], "bfloat16")
    assert [(m.experts, m.top_k, m.d, m.f) for m in found] == [(64, 8, 2048, 1024)] * 2 + [(6, 2, 16, 24)] * 2
    assert (found[3].gate_up, found[3].down) == ("int2_g64", "int8_g64")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(MoecError, match="no GPU"):
        check_gpu()
