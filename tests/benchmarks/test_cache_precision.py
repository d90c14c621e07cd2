"""What rounding keys and values costs a model: next to nothing, but not nothing."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import cache_precision
from moec.compiler.interpreter import Interpreter
from moec.compiler.model import Model
from moec.compiler.text import parse_graph
from moec.compiler.weights import MemoryWeights
from tests import tiny

SINKS = """
graph small {layers=1} {
  input %q: f32[B, T, 4, 8]
  input %k: f32[B, T, 2, 8]
  input %v: f32[B, T, 2, 8]
  param @sinks: f32[4] as f32
  %a: f32[B, T, 4, 8] = attention(%q, %k, %v, @sinks) {scale=0.4}
  return %a
}
"""


def test_keys_and_values_are_rounded_and_nothing_else() -> None:
    draw, graph = torch.Generator(), parse_graph(SINKS)
    draw.seed()
    q, k, v = (torch.randn(2, 9, heads, 8, generator=draw) for heads in (4, 2, 2))
    model, found = Model(graph, MemoryWeights({"sinks": torch.randn(4, generator=draw)})), list[torch.Tensor]()
    run = Interpreter(graph, model.weights)
    run.run([{"q": q, "k": k, "v": v}], lambda _, out: found.append(out[0]), observer=cache_precision.RoundedCache(model))
    (expected,) = run(q=q, k=k.bfloat16().float(), v=v.bfloat16().float())
    assert torch.equal(found[0], expected)
    assert not torch.equal(found[0], run(q=q, k=k, v=v)[0])


def test_the_small_model(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["cache", str(tiny.MODEL), "--data", str(tiny.TEXT), "--context", "64", "--tokens", "1280"]
    monkeypatch.setattr("sys.argv", [*command, "--json"])
    cache_precision.main()
    found = json.loads(capsys.readouterr().out)
    monkeypatch.setattr("sys.argv", command)
    cache_precision.main()
    assert found["all"] == found[tiny.TEXT.stem]
    assert found["all"]["tokens"] == 1280
    assert 1e-7 < found["all"]["kl_divergence"] < 1e-3
    assert abs(found["all"]["nll"] - found["all"]["reference_nll"]) < 2e-3
    rows = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines()[2:]]
    assert rows == [tiny.TEXT.stem, "all"]
