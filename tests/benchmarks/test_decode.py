"""The benchmark of whole models: a shape is compiled without weights and runs with random ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import decode, decode_model
from moec.compiler.backends.tvm.backend import TvmBackend
from moec.runtime.formats import get_format

TINY = Path(__file__).parents[2] / "examples" / "models" / "tiny-moe"


def shorter(folder: Path, layers: int) -> str:
    """A folder with the configuration of the small model, of fewer layers, which are traced and compiled the sooner."""
    config = json.loads((TINY / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    return str(folder)


def test_a_shape_without_weights_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    shape = ["--config", shorter(tmp_path, 2), "--recipe", "int4-g32", "--target", "cpu", "--context-length", "64"]
    command = ["decode", "build", str(folder), *shape]
    monkeypatch.setattr("sys.argv", [*command, "--experts", "int2_g32,int3_g32"])
    decode.main()
    found = decode_model.read(folder)
    weights = decode_model.random_weights(found)
    mapped = decode_model.mapped(weights, tmp_path / "weights")
    assert all(np.array_equal(mapped[key], array) and mapped[key].ctypes.data % 64 == 0 for key, array in weights.items())
    executor = decode_model.load(folder, mapped, 2)
    logits = executor.forward([(executor.add(), np.arange(7))])
    assert np.isfinite(logits).all()
    assert logits.std() > 0
    monkeypatch.setattr(
        "sys.argv", ["decode", "run", str(folder), "--batch", "1,2", "-n", "4", "--context", "8", "--prompt", "16", "--load"]
    )
    decode.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[2].strip() for line in lines[2:]] == ["1", "2"]
    asked, ahead = list[int](), executor.ahead
    monkeypatch.setattr(executor, "ahead", lambda steps, count: (asked.append(count), ahead(steps, count))[1])
    assert decode.decode_speed(executor, 1, 8, 5, portion=3) > 0
    assert asked == [3, 3, 3, 3, 3, 1, 3, 2]
    assert found["bytes_per_token"] > 0


def test_the_type_of_the_cache_is_an_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(TvmBackend, "build", lambda self, folder, locations: {"cache_dtype": self.platform.cache_dtype})

    config = shorter(tmp_path, 1)

    def build(*options: str) -> str:
        monkeypatch.setattr("sys.argv", ["decode", "build", str(tmp_path), "--config", config, "--recipe", "int4-g32", *options])
        decode.main()
        return str(json.loads((tmp_path / decode_model.FILE).read_text())["section"]["cache_dtype"])

    assert build() == "bfloat16"
    assert build("--kv-cache-dtype", "float32") == "float32"
    assert build("--target", "cpu") == "float32"
    with pytest.raises(SystemExit):
        build("--target", "cpu", "--kv-cache-dtype", "bfloat16")
    assert "--kv-cache-dtype bfloat16: the tvm backend keeps" in capsys.readouterr().err


def test_random_codes_have_the_spread_of_weights() -> None:
    for name in ("int2_g32", "int3_g32", "int4_g32", "int8_g32"):
        fmt = get_format(name)
        codes = np.random.default_rng(0).integers(0, fmt.levels, 4096)  # type: ignore[attr-defined]
        assert np.std(codes) * decode_model.spread_scale(name) == pytest.approx(decode_model.SPREAD, rel=0.2)
