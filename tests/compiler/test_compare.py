"""Comparison against plain evaluation, what is repeated and what is kept, and rows with errors."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moec.compiler import compare as module
from moec.compiler import reference
from moec.compiler.cli.main import main
from moec.compiler.compare import compare
from moec.compiler.context import Context
from moec.compiler.damage import Distance
from moec.compiler.errors import MoecError
from moec.compiler.evaluate import evaluate, read_windows
from moec.compiler.frontend.tokenizer import load_tokenizer
from moec.compiler.interpreter import Interpreter
from moec.compiler.model import Model
from moec.compiler.packed import coded_format
from moec.compiler.passes import run_passes
from moec.compiler.progress import Progress
from moec.compiler.recipe import Recipe, load_recipe
from moec.compiler.report import Comparison, Row, Run, kl_divergence, perplexity
from moec.compiler.stored import as_stored
from moec.compiler.weights import constant, packed_of
from moec.passes.quantize import Quantize
from tests import graphs, tiny

MODEL, TEXT = tiny.MODEL, tiny.TEXT
QUIET = Progress(quiet=True)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, Path]:
    folder = tmp_path_factory.mktemp("compared")
    (folder / "other.txt").write_text(TEXT.read_text()[3000:5000])
    out = folder / "out"
    recipes: list[str | Path] = ["int4", "none", folder / "missing.yaml"]
    return compare(MODEL, recipes, [TEXT, folder / "other.txt"], context=64, max_tokens=256, output=out, progress=QUIET), out


def test_rows(found: tuple[Comparison, Path]) -> None:
    rows = found[0].rows
    assert [row.recipe for row in rows] == ["none", "int4", "missing"]
    assert "no recipe file" in rows[2].error
    assert found[0].failed
    none, int4 = rows[0].runs[0], rows[1].runs[0]
    assert none.data["pooled"].kl_divergence == pytest.approx(0, abs=1e-6)
    assert none.data["pooled"].top1_agreement == 1
    assert none.data["prose_en"].perplexity == pytest.approx(evaluate(MODEL, TEXT, context=64, max_tokens=256, progress=QUIET).perplexity)
    tokens, parts = int4.data["pooled"].tokens, [int4.data["prose_en"], int4.data["other"]]
    assert tokens == sum(p.tokens for p in parts)
    assert int4.data["pooled"].kl_divergence == pytest.approx(sum(p.kl_divergence * p.tokens for p in parts) / tokens)
    assert int4.expert_bytes / none.expert_bytes == pytest.approx(4.25 / 16, abs=0.01)


def test_distance_is_that_of_a_plain_loop(found: tuple[Comparison, Path]) -> None:
    model = tiny.model()
    packed = run_passes(model, load_recipe("int4").passes)
    ids, targets = read_windows(TEXT, load_tokenizer(MODEL), 64, 256)
    inputs = {"ids": ids, "positions": torch.arange(64).expand(len(ids), -1)}
    p, q = (Interpreter(m.graph, m.weights)(**inputs)[0].double().log_softmax(-1) for m in (model, packed))
    run = found[0].rows[1].runs[0].data["prose_en"]
    assert run.kl_divergence == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert run.nll == pytest.approx(float(-q.gather(-1, targets[..., None]).mean()), rel=1e-5)
    assert run.top1_agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))


def test_groups_of_windows_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = graphs.model()
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 40, (9, 8)))
    targets = ids.roll(-1, 1)
    changed = run_passes(model, [Quantize(experts="int2_g32")])
    whole = reference.Reference(model, ids, targets, tmp_path / "a")(changed)
    monkeypatch.setattr(reference, "BATCH_BYTES", 4 * 40 * 8 * 2)
    monkeypatch.setattr(reference, "STATE_BYTES", 5 * 8 * reference.state_bytes(model.graph))
    parts = reference.Reference(model, ids, targets, tmp_path / "b")(changed)
    assert parts.kl_divergence == pytest.approx(whole.kl_divergence, rel=1e-4)
    assert whole.kl_divergence > 0
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10})())
    with pytest.raises(MoecError, match="need 11520 bytes and .* has 10: lower --max-tokens"):
        reference.Reference(model, ids, targets, tmp_path / "c")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_finished_rows_are_kept(found: tuple[Comparison, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, out = found

    def refuse(*_: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(module, "Reference", refuse)
    again = compare(MODEL, ["int4"], [TEXT, out.parent / "other.txt"], context=64, max_tokens=256, output=out, progress=QUIET)
    assert [r.to_json() for r in again.rows] == [r.to_json() for r in first.rows[:2]]
    shorter = compare(MODEL, [], [TEXT], context=64, max_tokens=128, output=out, progress=QUIET)
    assert "measured again" in shorter.rows[0].error


@dataclass(frozen=True)
class _Noise:
    """A random pass."""

    size: float = 0.02

    def run(self, model: Model, context: Context) -> Model:
        name = next(n for n in model.graph.params if "experts" in n)
        value = model.load(name)
        noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(context.seed))
        return model.edited(model.graph, {name: constant(value + self.size * noise)})


def test_only_what_depends_on_the_seed_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    recipes = {
        "noise": Recipe("noise", "", (_Noise(),), ({"noise": {}},)),
        "int4": load_recipe("int4"),
        "broken": Recipe("broken", "", (object(),), ({"broken": {}},)),  # type: ignore[arg-type]
    }
    monkeypatch.setattr(module, "_load", lambda path: (recipes[str(path)], ""))
    rows = compare(MODEL, list(recipes), TEXT, seeds=3, context=64, max_tokens=64, progress=QUIET).rows
    assert {row.recipe: len(row.runs) for row in rows} == {"none": 1, "noise": 3, "int4": 1, "broken": 0}
    spread = rows[1].to_json()["data"]["pooled"]
    assert spread["kl_divergence_std"] == pytest.approx(np.std([kl_divergence(r) for r in rows[1].runs], ddof=1))
    assert spread["kl_divergence_std"] > 0
    assert "_std" not in json.dumps(rows[2].to_json())
    assert rows[3].error.startswith("AttributeError")


def _row(name: str, size: int, kl: float) -> Row:
    distance = Distance(10, 2 + kl, kl, 0.9, 2.0)
    return Row("m", name, runs=(Run(0, False, size, 100, size // 2, 50, 10, 0.1, {"t": distance, "pooled": distance}),))


def test_pareto_front_table_and_json() -> None:
    rows = (_row("none", 200, 0.0), _row("good", 50, 0.1), _row("bad", 60, 0.2), _row("small", 40, 0.5), Row("m", "x", error="a | b"))
    found = Comparison(rows, ("t",))
    assert [r.recipe for r in rows if found.on_front(r)] == ["none", "good", "small"]
    lines = found.table().splitlines()
    assert lines[3] == "| m | **good** | 50 | 25 | 0.250 | 4.00 | 4.00 | 8.166 | 0.1000 | 0.9000 |"
    assert "error: a / b" in lines[6]
    assert len({len(re.findall(r"\|", line)) for line in lines[:7]}) == 1
    assert Run.from_json(json.loads(json.dumps(rows[1].runs[0].to_json()))) == rows[1].runs[0]
    assert perplexity(rows[1].runs[0]) == pytest.approx(np.exp(2.1))


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = Comparison((_row("none", 200, 0.0), _row("good", 50, 0.1)), ("t",))
    found.plot(tmp_path / "a.svg")
    assert "KL divergence" in (tmp_path / "a.svg").read_text() or (tmp_path / "a.svg").stat().st_size > 5000
    with pytest.raises(MoecError, match="ends in .svg"):
        found.plot(tmp_path / "a.xyz")


def test_stored_values_are_rounded() -> None:
    model = graphs.model()
    formats = {"layers.0.experts.up": ("int4_g32",) * 3 + ("f16",) * 3, "layers.0.gate.weight": "bf16"}
    params = [type(p)(p.name, p.type, formats[p.name]) for p in model.graph.params.values() if p.name in formats]  # type: ignore[arg-type]
    mixed = model.with_params(params, {})
    stored = as_stored(mixed)
    up, exact = stored.load("layers.0.experts.up"), model.load("layers.0.experts.up")
    assert torch.equal(stored.load("layers.0.gate.weight"), model.load("layers.0.gate.weight").bfloat16().float())
    assert torch.equal(up[3:], exact[3:].half().float())
    assert up[0].unique().numel() < exact[0].unique().numel()
    quantized = run_passes(model, [Quantize(experts="int4_g32")])
    packed = packed_of(quantized.weights, "layers.0.experts.up", 2)
    fmt = coded_format(quantized.graph.params["layers.0.experts.up"])
    assert packed is not None and fmt is not None
    assert torch.equal(as_stored(quantized).load("layers.0.experts.up")[2], packed.values(fmt))
    assert torch.equal(up[2], packed.values(fmt))  # without codes, rounded to nearest


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--data", str(TEXT), "--max-tokens", "64", "--context", "64"]
    assert main(["compare", str(MODEL), "int9.yaml", "--recipe", "int8", *options, "--json", "-"]) == 2
    out, err = capsys.readouterr()
    result: dict[str, Any] = json.loads(out)
    assert [row["recipe"] for row in result["rows"]] == ["none", "int8", "int9"]
    assert err.splitlines()[-1].startswith("error: 1 of 3 rows failed; tiny-moe, int9: no recipe file int9.yaml")
    with pytest.raises(MoecError, match=r"the folder has no \*\.txt file"):
        compare(MODEL, ["int8"], tmp_path)
