"""What rounding activations costs a model: more in E4M3 than in bfloat16, and nothing where logits are computed."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import activation_precision
from moec.compiler.interpreter import Interpreter
from moec.compiler.model import Model
from moec.compiler.text import parse_graph
from moec.compiler.weights import MemoryWeights
from tests import tiny

EXPERTS = """
graph small {layers=1} {
  input %x: f32[B, T, 136]
  input %w: f32[B, T, 2]
  input %i: i64[B, T, 2]
  param @up: f32[3, 32, 136] as f32
  param @down: f32[3, 136, 16] as f32
  param @bias: f32[3, 32] as f32
  param @head: f32[5, 136] as f32
  %y: f32[B, T, 136] = experts(%x, %i, %w, @up, @down, @bias) {activation="silu", gated=true, limit=0.0}
  %z: f32[B, T, 5] = linear(%x, @head)
  return %y, %z
}
"""


@pytest.mark.parametrize(("kind", "least", "most"), [("bfloat16", 1e-3, 5e-3), ("fp8", 1e-2, 5e-2)])
def test_experts_are_rounded_and_logits_are_not(kind: str, least: float, most: float) -> None:
    draw, graph = torch.Generator(), parse_graph(EXPERTS)
    draw.seed()
    weights = {name: torch.randn([int(d) for d in p.type.shape], generator=draw) / 8 for name, p in graph.params.items()}
    model, found = Model(graph, MemoryWeights(weights)), list[tuple[torch.Tensor, ...]]()
    x, w = torch.randn(2, 40, 136, generator=draw), torch.rand(2, 40, 2, generator=draw)
    inputs = {"x": x, "w": w, "i": torch.randint(0, 4, (2, 40, 2), generator=draw)}  # 3 is skipped
    run, observer = Interpreter(graph, model.weights), activation_precision.RoundedActivations(model, kind)
    run.run([inputs], lambda _, out: found.append(tuple(out)), observer=observer)
    y, z = run(**inputs)
    assert least < float((found[0][0] - y).norm() / y.norm()) < most
    assert torch.equal(found[0][1], z)


def test_the_small_model(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["activations", str(tiny.MODEL), "--data", str(tiny.TEXT), "--context", "64", "--tokens", "640", "--json"]
    found = []
    for kind in activation_precision.KINDS:
        monkeypatch.setattr("sys.argv", [*command, "--kind", kind])
        activation_precision.main()
        found.append(json.loads(capsys.readouterr().out)["all"]["kl_divergence"])
    assert 1e-6 < found[0] < found[1] < 1e-2
