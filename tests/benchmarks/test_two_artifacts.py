"""The comparison of two artifacts: one with itself, and with a coarser one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import two_artifacts
from moec.compiler.pipeline import compile_model

ROOT = Path(__file__).parents[2] / "examples"


def test_an_artifact_and_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, recipe in (("a", "f32"), ("b", "int2")):
        compile_model(ROOT / "models" / "tiny-moe", tmp_path / name, backend="onnx", recipe=recipe)
    found = {}
    for other in "ab":
        command = ["two", str(tmp_path / "a"), str(tmp_path / other), "--data", str(ROOT / "data" / "prose_en.txt"), "--json"]
        monkeypatch.setattr("sys.argv", [*command, "--prompts", "3", "-n", "8"])
        two_artifacts.main()
        found[other] = json.loads(capsys.readouterr().out)
    assert found["a"] == {
        "largest_difference": 0.0, "same_best": 1.0, "prompts": 3, "tokens": 8, "same": 3, "parted_at_ties": 0, "different": [],
    }  # fmt: skip
    assert found["b"]["largest_difference"] > 1e-3
    assert found["b"]["same_best"] < 1
