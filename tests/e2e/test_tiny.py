"""The whole road on a trained model: checkpoint -> artifact -> tokens, through the command line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from moec import runtime
from moec.compiler.artifact_weights import open_artifact
from moec.compiler.cli.main import main
from moec.compiler.frontend.tokenizer import load_tokenizer
from moec.compiler.interpreter import Interpreter

ROOT = Path(__file__).parents[2]
MODEL, TEXT = ROOT / "examples/models/tiny-moe", ROOT / "examples/data/prose_en.txt"
BACKENDS = ("tvm", "onnx")


@pytest.fixture(scope="module", params=[(b, r) for b in BACKENDS for r in ("f32", "int4")], ids="-".join)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    backend, recipe = request.param
    out = tmp_path_factory.mktemp("artifact") / f"{recipe}.moec"
    assert main(["compile", str(MODEL), "-o", str(out), "--backend", backend, "--recipe", recipe]) == 0
    return out, recipe


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """Run a command with --json and return its one object."""
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_greedy_tokens_are_transformers(compiled: tuple[Path, str]) -> None:
    artifact, recipe = compiled
    if recipe != "f32":
        pytest.skip("a packed model is another model")
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    ids = load_tokenizer(MODEL).encode(TEXT.read_text()[:4000], add_special_tokens=False).ids
    prompts = [ids[at : at + size] for at, size in ((0, 5), (100, 40), (300, 100))]
    session = runtime.load(artifact)
    together = list(session.generate(prompts, max_new_tokens=24, ignore_eos=True))
    for number, prompt in enumerate(prompts):
        out = model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)
        expected = out[0, len(prompt) :].tolist()
        assert [t.id for t in session.generate(prompt, max_new_tokens=24, ignore_eos=True)] == expected
        assert [t.id for t in together if t.index == number] == expected


def test_logits_are_the_interpreters(compiled: tuple[Path, str]) -> None:
    artifact, _ = compiled
    ids = torch.tensor(load_tokenizer(MODEL).encode(TEXT.read_text()[4000:5000], add_special_tokens=False).ids[:96])
    truth = Interpreter(*open_artifact(artifact))(ids=ids[None], positions=torch.arange(96)[None])[0][0].double()
    executor = runtime.load(artifact).executor
    sequence = executor.add()
    found = torch.from_numpy(executor.forward([(sequence, ids.numpy())], all_logits=True)).double()
    kl = (truth.softmax(-1) * (truth.log_softmax(-1) - found.log_softmax(-1))).sum(-1).mean()
    if recipe_computes_in_float(artifact):
        assert kl < 1e-6
    else:
        assert kl < 1e-2


def recipe_computes_in_float(artifact: Path) -> bool:
    """Whether the backend keeps activations in (at least 16-bit) precision for this artifact."""
    manifest = json.loads((artifact / "manifest.json").read_text())
    return not manifest["executor"].get("activation_quantised")


def test_commands_on_an_artifact(compiled: tuple[Path, str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    artifact, recipe = compiled
    assert main(["verify", str(artifact)]) == 0
    said = call(capsys, "run", str(artifact), "The captain said", "-n", "8")
    assert said["text"]
    text = tmp_path / "text.txt"
    text.write_text(TEXT.read_text()[:3000])
    quality = call(capsys, "eval", str(artifact), "--data", str(text), "--reference", str(MODEL), "--context", "128")
    assert quality["kl_divergence"] < (1e-6 if recipe == "f32" else 0.1)
    assert 10 < quality["perplexity"] < 60
    speed = call(capsys, "bench", str(artifact), "-p", "16", "-n", "8")
    assert speed["decode_tokens_per_s"] > 0
    counts = json.loads((artifact / "manifest.json").read_text())["backend"] == "tvm"
    assert speed["experts_per_token"] == (2 if counts else None)
    found = call(capsys, "inspect", str(artifact))
    assert found["parameters"] > 3_000_000


def test_the_runtime_needs_neither_torch_nor_a_compiler(compiled: tuple[Path, str]) -> None:
    script = (
        "import sys; from moec.runtime import load\n"
        f"print(len([t for t in load({str(compiled[0])!r}).generate('Once', max_new_tokens=4)]))\n"
        "heavy = {'torch', 'transformers', 'tvm', 'onnx'} & set(sys.modules); assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) == 4


def checkpoint(folder: Path) -> Path:
    """A copy of the model that a test may damage."""
    shutil.copytree(MODEL, folder)
    return folder


def damage(kind: str, folder: Path) -> None:
    weights, config = folder / "model.safetensors", folder / "config.json"
    data = json.loads(config.read_text())
    if kind == "no config":
        config.unlink()
    elif kind == "no weights":
        weights.unlink()
    elif kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif kind == "not a number":
        content = bytearray(weights.read_bytes())
        content[-2:] = b"\xff\x7f"  # the last bfloat16 becomes a NaN
        weights.write_bytes(content)
    elif kind == "wrong shape":
        config.write_text(json.dumps({**data, "hidden_size": 96}))
    elif kind == "unknown architecture":
        config.write_text(json.dumps({**data, "model_type": "olmoo"}))
    elif kind == "quantised":
        config.write_text(json.dumps({**data, "quantization_config": {"quant_method": "gptq"}}))
    elif kind == "remote code":
        config.write_text(json.dumps({**data, "model_type": "mine", "auto_map": {"AutoConfig": "evil.Config"}}))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no config", "config.json"),
        ("no weights", "safetensors"),
        ("truncated", "model.safetensors"),
        ("not a number", "NaN"),
        ("wrong shape", "shape"),
        ("unknown architecture", "did you mean 'olmo"),
        ("quantised", "already quantised"),
        ("remote code", "never run"),
    ],
)
def test_bad_checkpoints(kind: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(kind, checkpoint(tmp_path / "model"))
    capsys.readouterr()
    assert main(["compile", str(tmp_path / "model"), "-o", str(tmp_path / "out.moec")]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compile", "no/such/folder", "-o", "x.moec"], "no such folder"),
        (["compile", str(MODEL), "-o", "x.moec", "--target", "cpuu"], "did you mean 'cpu'"),
        (["compile", str(MODEL), "-o", "x.moec", "--recipe", "int44"], "did you mean 'int4'"),
        (["compile", str(MODEL), "-o", "x.moec", "--backend", "tvn"], "did you mean 'tvm'"),
        (["compile", str(MODEL), "-o", "x.moec", "--memory", "1MB"], "more than --memory"),
        (["compile", str(MODEL)], "-o OUT.moec"),
        (["run", "no.moec", "hello"], "no.moec"),
    ],
)
def test_bad_arguments(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert not list(tmp_path.iterdir())


def test_bad_prompts(compiled: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    for prompt, message in (("", "at least one token"), ("word " * 2000, "context")):
        assert main(["run", str(compiled[0]), prompt]) == 2
        assert message in capsys.readouterr().err
