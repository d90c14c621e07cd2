"""What `moec inspect` prints about an artifact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moec.compiler.cli.main import main as call
from tests.runtime.fakes import write_artifact

Capture = pytest.CaptureFixture[str]


def test_inspect_summarises_an_artifact(tmp_path: Path, capsys: Capture) -> None:
    folder = write_artifact(
        tmp_path / "a.moec",
        recipe=[{"quantize": {"format": "int4_g64"}}],
        quality={"kl_divergence": 0.01},
        journal=[{"pass": "p", "kept": 3}],
        calibration={"tokens": 7, "domains": ["a", "b"]},
    )
    assert call(["inspect", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "did: pass p, kept 3\ncalibrated on 7 tokens of a, b\nquality: KL divergence 0.0100 nats a token\n" in out
    assert "tiny (markov)" in out
    assert "int4_g64: 1 tensors, 1,024 parameters" in out
    assert call(["inspect", str(folder), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["parameters"] == 8 * 128 + 3
    assert summary["formats"] == {"f32": {"tensors": 1, "parameters": 3}, "int4_g64": {"tensors": 1, "parameters": 1024}}
    assert summary["quality"] == {"kl_divergence": 0.01}
    assert call(["inspect", str(folder), "--stats"]) == 2
    assert "--stats and --locality look at checkpoints" in capsys.readouterr().err


def test_inspect_survives_any_history(tmp_path: Path, capsys: Capture) -> None:
    folder = write_artifact(tmp_path / "a.moec", quality={"x": [1]}, journal=["a", 3], calibration={"domains": 4})
    assert call(["inspect", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "calibrated on None tokens of ?" in out
    assert "quality: x [1]" in out


@pytest.mark.parametrize(
    ("executor", "sizes", "line"),
    [
        ({"cache_dtype": "bfloat16"}, {"cache_bytes_per_token": 1536}, "key/value cache 1.5 KiB a token in bfloat16"),
        ({"cache_dtype": "float32"}, {"bytes_per_token": 1}, "key/value cache in float32"),
        ({"cache_dtype": "float32"}, [], "key/value cache in float32"),
        ({}, {"cache_bytes_per_token": 1536}, None),
    ],
    ids=["both", "type only", "no sizes", "no type"],
)
def test_inspect_says_what_the_cache_takes(executor: Any, sizes: Any, line: str | None, tmp_path: Path, capsys: Capture) -> None:
    folder = write_artifact(tmp_path / "a.moec", executor=executor, sizes=sizes)
    assert call(["inspect", str(folder)]) == 0
    found = [text for text in capsys.readouterr().out.splitlines() if text.startswith("key/value cache")]
    assert found == ([] if line is None else [line])
