"""What is passed to the kernels is what they declare, and the run on a GPU as far as it goes with kernels that are made up."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import moe_layer, moe_layer_run
from benchmarks.moe_layer_build import Entry
from moec.compiler.measure import device, sweep
from moec.compiler.measure import layer as of_layer
from moec.compiler.measure.build import kernel_functions
from moec.compiler.measure.cases import Case, Index
from moec.compiler.measure.device import Ceilings
from moec.compiler.measure.layer import LayerWeights, Runner, Tokens, expected_result, random_tokens, random_weights
from moec.compiler.measure.layers import make_layer
from moec.targets import get_target
from moec.targets.kernels.cuda.experts_layer import Layer
from moec.targets.kernels.cuda.space import default
from moec.targets.kernels.cuda.tuned import choose
from moec.targets.measured import read_records

MIXED = make_layer((6, 2, 520, 392, True), "int2_g64+int3_g64_asym+int8_g128/int4_g128+bf16")
LAYERS = [MIXED, make_layer((3, 1, 128, 72, True), "int4_g64", "float32"), Layer(4, 2, 256, 40, "bf16", "int3_channel", gated=False)]
LAYERS += [make_layer((4, 2, 136, 264, True), "int4_g64+bf16/fp8_block128", widths=(264, 40, 8))]
LAYERS += [make_layer((4, 2, 136, 72, True), "fp8_block128+fp8_channel+int4_g64/fp8_block128")]
NAMES = {torch.bfloat16: ("bfloat16", "uint16"), torch.uint16: ("uint16",), torch.uint32: ("uint32",)}


STREAM = 42


@pytest.fixture(autouse=True)
def stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's current stream, which a machine without a GPU does not have."""
    monkeypatch.setattr("torch.cuda.current_stream", lambda: SimpleNamespace(device="cuda:0", cuda_stream=STREAM))


class Ffi:
    """In the place of `tvm_ffi`: tensors stay torch's."""

    @staticmethod
    def from_dlpack(x: Tensor) -> Tensor:
        return x

    @staticmethod
    def device(name: str) -> str:
        return name

    @staticmethod
    def use_raw_stream(_: object, stream: int) -> Any:
        assert stream == STREAM
        return nullcontext()


class Library(dict[str, Callable[..., None]]):
    """In the place of a library: the last kernel writes what the layer computes, times `factor`."""

    def __init__(self, case: Case, factor: float = 1.0) -> None:
        self.weights: LayerWeights | None = None
        self.tokens: Tokens | None = None
        functions = dict.fromkeys(case.functions, self._nothing)
        last = case.functions[-1]

        def write(*arguments: Tensor) -> None:
            if case.kernel == "gate_up":
                arguments[-1].view(torch.int32).fill_(1)
            elif case.kernel == "down":
                arguments[-1].fill_(factor)
            else:
                assert self.weights is not None and self.tokens is not None
                arguments[-1].copy_(factor * expected_result(self.weights, self.tokens))

        super().__init__({**functions, last: write})

    @staticmethod
    def _nothing(*_: Tensor) -> None: ...


@pytest.fixture(autouse=True)
def _cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything on the processor; times are made up."""
    monkeypatch.setattr(of_layer, "DEVICE", "cpu")
    monkeypatch.setattr(random_weights, "__defaults__", (False, "cpu"))
    monkeypatch.setattr(random_tokens, "__defaults__", ("uniform", 0.0, "cpu"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
@pytest.mark.parametrize(("kernel", "tokens"), [("decode", 3), ("gate_up", 1), ("down", 8), ("prefill", 5), ("prefill", 0)])
def test_kernels_get_what_they_declare(kernel: str, tokens: int, layer: Layer, biases: bool) -> None:
    case = Case.of(kernel, layer, default(kernel, layer, tokens), tokens, activation="relu", biases=biases)
    runner = Runner(case, Library(case), tokens, Ffi)
    given = runner.bind(random_weights(layer, 0, biases), random_tokens(layer, tokens, 0)).kept  # type: ignore[attr-defined]
    for name, function in kernel_functions(case).items():
        buffers = list(function.params)
        assert len(buffers) == len(given[name])
        for buffer, tensor in zip(buffers, given[name], strict=True):
            assert str(buffer.dtype) in NAMES.get(tensor.dtype, (str(tensor.dtype).removeprefix("torch."),)), (name, buffer.name)
            assert len(buffer.shape) == tensor.ndim
            sizes = zip(buffer.shape, tensor.shape, strict=True)
            assert all(size == int(want) for want, size in sizes if str(want).isdigit()), (name, buffer.name)
            assert tensor.is_contiguous()


def loader(monkeypatch: pytest.MonkeyPatch, factor: float = 1.0) -> None:
    """Runners of libraries that are made up."""

    def load(_: Path, case: Case, name: str, tokens: int) -> Runner:
        assert name == "file"
        library = Library(case, factor)
        runner = Runner(case, library, tokens, Ffi)
        bind = runner.bind

        def remember(weights: LayerWeights, drawn: Tokens) -> Callable[[], Tensor]:
            run = bind(weights, drawn)

            def call() -> Tensor:
                library.weights, library.tokens = weights, drawn
                return run()

            return call

        monkeypatch.setattr(runner, "bind", remember)
        return runner

    monkeypatch.setattr(Runner, "load", load)
    for module in (moe_layer_run, sweep):
        monkeypatch.setattr(module, "time_graph", lambda calls, *_: float(len([call() for call in calls])))


def prepare(folder: Path, monkeypatch: pytest.MonkeyPatch, factor: float = 1.0) -> list[Entry]:
    """A folder with a plan, and a GPU that is made up."""
    loader(monkeypatch, factor)
    for module in (moe_layer_run, device):
        monkeypatch.setattr(module, "check_gpu", lambda: "GPU")
        monkeypatch.setattr(module, "measure_ceilings", lambda: Ceilings(3000.0, 2900.0, 700.0))
    entries = []
    for layer in (MIXED, LAYERS[1]):
        for tokens in (0, 1, 3, 40):
            choice = choose(get_target("h100"), layer, tokens, [])
            entries.append(Entry("odd", tokens, choice.why, Case.of(choice.kernel, layer, choice.options, tokens)))
    Index("h100-sxm", "sm_90a", "0.27", {}, {entry.case: "file" for entry in entries}).write(folder)
    (folder / "moe_layer.json").write_text(json.dumps([entry.to_json() for entry in entries]))
    return entries


def test_a_run_checks_and_times_every_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    entries = prepare(tmp_path, monkeypatch)
    (tmp_path / "mine.py").write_text("def layer(w, x, ids, share):\n    raise RuntimeError('no such kernel')\n")
    out = tmp_path / "out.json"
    assert moe_layer.main(["run", str(tmp_path), "--json", str(out), "--peer", str(tmp_path / "mine.py"), "--skipped", "0.5"]) == 0
    found = json.loads(out.read_text())
    ours = [row for row in found["rows"] if row["kernel"].startswith("moec")]
    assert len(ours) == len(entries)
    assert all(row["error"] < 5e-3 and not row["problem"] for row in ours)
    assert {row["us"] for row in ours if row["tokens"]} == {1.0 * moe_layer_run.FEW, 1.0 * moe_layer_run.MANY}
    peers = [row for row in found["rows"] if row["kernel"] == "peer mine"]
    assert {row["problem"] for row in peers} == {"RuntimeError: no such kernel"}
    printed = capsys.readouterr().out
    assert "0 of ours failed" in printed
    assert "| shape | format | kernel | 1 | 3 | 40 |" in printed


def test_a_wrong_kernel_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(tmp_path, monkeypatch, factor=1.01)
    assert moe_layer.main(["run", str(tmp_path), "--check"]) == 1
    assert "6 of ours failed or are off" in capsys.readouterr().out, "all but those of no tokens"


def test_a_sweep_keeps_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    entries, small = prepare(tmp_path, monkeypatch), LAYERS[1]
    wanted = sweep.tasks([small], [1, 40], get_target("h100"), read_records("h100-sxm"))
    Index("h100-sxm", "sm_90a", "0.27", {}, {task.case: "file" for task in wanted}).write(tmp_path)
    (tmp_path / "moe_layer.json").write_text(json.dumps([e.to_json() for e in entries if e.case.layer == small and e.tokens in (1, 40)]))
    assert moe_layer.main(["sweep", str(tmp_path), "--records", str(tmp_path / "records")]) == 0
    (record,) = read_records("h100-sxm", [tmp_path / "records"])
    assert len(record.measurements) == len(wanted)
    assert {m.kernel for m in record.measurements} == {"gate_up", "down", "prefill"}
    assert all((m.error is not None) == (m.kernel == "prefill") for m in record.measurements)
    assert "| gate_up | 1 |" in capsys.readouterr().out
