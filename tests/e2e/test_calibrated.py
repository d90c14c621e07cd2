"""Compiling with calibration text: what the artifact says of it, what stops it, and a checkpoint made of the artifact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from moec.compiler.artifact_weights import open_artifact
from moec.compiler.backends import make_backend
from moec.compiler.cli.main import main
from moec.compiler.errors import MoecError
from moec.compiler.export import export_model
from moec.compiler.inspection import inspect_checkpoint
from moec.compiler.interpreter import Interpreter
from moec.compiler.pipeline import compile_model
from moec.compiler.progress import Progress
from tests import tiny

QUIET = Progress(quiet=True)


def test_an_artifact_says_what_it_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a.moec"
    options = {"calibration": tiny.TEXT, "calibration_tokens": 1024, "backend": "onnx", "recipe": "int4", "progress": QUIET}
    with pytest.raises(MoecError, match=r"the recipe costs 0\.\d+ nats a token .* more than --max-kl 1e-06: choose a milder recipe"):
        compile_model(tiny.MODEL, out, max_kl=1e-6, **options)  # type: ignore[arg-type]
    with pytest.raises(MoecError, match="--statistics needs calibration text"):
        compile_model(tiny.MODEL, out, statistics=tmp_path / "s")
    assert list(tmp_path.iterdir()) == []
    compile_model(tiny.MODEL, out, max_kl=0.5, seed=3, **options)  # type: ignore[arg-type]
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["recipe"][0]["quantize"]["experts"].startswith("int4")
    assert manifest["calibration"]["domains"] == ["prose_en"]
    assert manifest["calibration"]["seed"] == 3
    assert 0 < manifest["quality"]["kl_divergence"] < 0.5
    assert main(["inspect", str(out)]) == 0
    printed = capsys.readouterr().out
    assert f"KL divergence {manifest['quality']['kl_divergence']:.4f} nats a token" in printed
    assert "calibrated on 1024 tokens of prose_en" in printed
    # And a checkpoint of the artifact: what transformers computes is what the artifact's codes stand for.
    export_model(out, tmp_path / "hf", dtype="f32", progress=QUIET)
    ids = torch.randint(0, 4096, (1, 24), generator=torch.Generator().manual_seed(0))
    expected = Interpreter(*open_artifact(out))(ids=ids, positions=torch.arange(24)[None])[0]
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()(ids).logits
    assert (found - expected).abs().max() < 1e-4
    assert (tmp_path / "hf/tokenizer.json").is_file()
    with pytest.raises(MoecError, match="an artifact has been through its own"):
        export_model(out, tmp_path / "b", recipe="int4")


def test_a_killed_run_goes_on_from_its_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes lie beside the output while a run lasts, and stay where it was killed; an error takes them away."""
    (tmp_path / "r.yaml").write_text("passes:\n  - quantize: {experts: int4_g64, method: gptq, options: {sweeps: 0}}\n")
    out, work = tmp_path / "a.moec", tmp_path / "a.moec.work"
    options: dict[str, Any] = {"calibration": tiny.TEXT, "calibration_tokens": 1024, "backend": "onnx", "progress": QUIET}
    calls = 0

    def lowered(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        stamps.append([p.stat().st_mtime_ns for p in sorted(work.rglob("codes-*.safetensors"))])
        if calls == 1:
            raise KeyboardInterrupt
        return make_backend(*args, **options)

    stamps: list[list[int]] = []
    monkeypatch.setattr("moec.compiler.pipeline.make_backend", lowered)
    with pytest.raises(KeyboardInterrupt):
        compile_model(tiny.MODEL, out, recipe=tmp_path / "r.yaml", **options)
    assert stamps[0]
    compile_model(tiny.MODEL, out, recipe=tmp_path / "r.yaml", **options)
    assert stamps[0] == stamps[1]  # read, not made again
    assert not work.exists()
    with pytest.raises(MoecError, match="more than --memory"):
        compile_model(tiny.MODEL, out, recipe=tmp_path / "r.yaml", memory=1000, **options)
    assert not work.exists()


def test_inspect_with_text(tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text(tiny.TEXT.read_text()[20_000:26_000])
    file, page = tmp_path / "s.safetensors", tmp_path / "page.html"
    options = {"calibration": [tiny.TEXT, tmp_path / "other.txt"], "calibration_tokens": 2048, "progress": QUIET}
    found = inspect_checkpoint(tiny.MODEL, stats=True, locality=True, statistics=file, html=page, **options)  # type: ignore[arg-type]
    again = inspect_checkpoint(tiny.MODEL, stats=True, statistics=file)
    with pytest.raises(MoecError, match=r"needs --calibration FILE, or --statistics .* \(found neither\)"):
        inspect_checkpoint(tiny.MODEL, stats=True)
    (tmp_path / "short.txt").write_text("Too short.")
    with pytest.raises(MoecError, match=r"short.txt has \d+ tokens, fewer than one window of 513"):
        inspect_checkpoint(tiny.MODEL, stats=True, calibration=tmp_path / "short.txt")
    use = found.summary["use"]
    assert use["domains"] == ["prose_en", "other"]
    assert len(use["layers"]) == 4
    assert all(0 < layer["entropy"] <= 1 and 0 < layer["srp"] <= 1 for layer in use["layers"])
    assert [u.share for u in again.uses] == [u.share for u in found.uses]
    assert again.uses[0].locality is None
    text = page.read_text()
    assert text.count('class="heat" viewBox') == 3
    assert "http" not in text.replace("http://www.w3.org", "")
