"""Work happens on the device that is named, and what that device cannot be is one error."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moec.compiler.compare import compare
from moec.compiler.device import on_device
from moec.compiler.errors import MoecError
from moec.compiler.evaluate import evaluate
from moec.compiler.inspection import inspect_checkpoint
from moec.compiler.pipeline import compile_model
from tests import tiny

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_a_device_is_torchs_default_within_and_not_after() -> None:
    place = on_device("cpu")
    for _ in range(2):
        with torch.device("meta"), on_device("cpu"):
            assert torch.get_default_device().type == "cpu"
            assert torch.empty(1).device.type == "cpu"
        with place:
            assert torch.get_default_device().type == "cpu"
    with torch.device("meta"), on_device(None):
        assert torch.empty(1).device.type == "meta"


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:-1", "cuda:one", "cpu:1", "meta", ""])
def test_names_that_are_no_device(name: str) -> None:
    with pytest.raises(MoecError, match="expected cpu, cuda, or cuda:N"):
        on_device(name)


def test_a_device_that_is_not_there_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def empty(*_: object, **__: object) -> torch.Tensor:
        raise AssertionError("Torch not compiled with CUDA enabled\nmore")

    monkeypatch.setattr(torch, "empty", empty)
    for cuda, count, remedy in (
        (None, 0, "install a CUDA build"),
        ("12.8", 0, "nvidia-smi"),
        ("12.8", 2, "choose one of cuda:0 to cuda:1"),
    ):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        with pytest.raises(MoecError, match=rf"--device cuda:7: torch .* says: Torch not compiled with CUDA enabled; .*{remedy}"):
            on_device("cuda:7")


def test_every_entry_looks_at_the_device_before_it_works(tmp_path: Path) -> None:
    with pytest.raises(MoecError, match="--device tpu"):
        compile_model(tmp_path / "none", tmp_path / "out", device="tpu")
    with pytest.raises(MoecError, match="--device tpu"):
        evaluate(tmp_path / "none", tmp_path / "text", device="tpu")
    with pytest.raises(MoecError, match="--device tpu"):
        inspect_checkpoint(tmp_path / "none", device="tpu")


def test_calibrated_work_stays_on_the_device_that_is_named(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("passes: [assign_bits: {budget: 3.5, formats: [int3_g32, int4_g32], objective: fisher, method: gptq}]\n")
    tiny.load()
    with torch.device("meta"):  # where nothing has a value: what was made outside of the named device would fail
        found = compare(
            tiny.MODEL, [recipe], tiny.TEXT, calibration=tiny.TEXT, calibration_tokens=1024, max_tokens=512, context=128, device="cpu"
        )
    assert [row.error for row in found.rows] == ["", ""]
    assert found.rows[1].runs[0].data["pooled"].kl_divergence > 0


@GPU
def test_a_gpu_gives_what_the_processor_gives() -> None:
    here, there = (evaluate(tiny.MODEL, tiny.TEXT, context=128, max_tokens=1024, device=name) for name in ("cpu", "cuda"))
    assert there.nll == pytest.approx(here.nll, rel=1e-4)
