"""Modules that are no Transformers: `moec.moe_experts` computes, traces and keeps its meaning."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

import moec
from examples.time_series_moe import Forecaster
from moec.compiler.errors import MoecError
from moec.compiler.frontend.module import trace
from moec.compiler.interpreter import Interpreter


def test_the_forecaster_becomes_a_graph() -> None:
    torch.manual_seed(0)
    model = Forecaster().eval()
    graph, weights = trace(model, {"series": torch.randn(3, 7, 24)}, {"series": {0: "B", 1: "T"}})
    by_op = {n.op: n for n in graph.nodes}
    assert by_op["router"].attrs == {"top_k": 2, "score": "sigmoid", "normalize": True}
    assert by_op["experts"].attrs["activation"] == "gelu" and by_op["experts"].attrs["gated"] is False
    assert "layer_norm" in by_op and graph.symbols == ("B", "T") and graph.meta["moe"]
    for shape in ((1, 1, 24), (2, 50, 24)):
        series = torch.randn(*shape)
        (found,) = Interpreter(graph, weights)(series=series)
        with torch.no_grad():
            assert (found - model(series)).abs().max() < 1e-5


class Layouts(nn.Module):
    """Experts kept transposed, with gate and up rows alternating, chosen from image patches."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 16, 24))  # [E, D, 2F]
        self.down = nn.Parameter(torch.randn(4, 12, 16))  # [E, F, D]
        self.route = nn.Linear(16, 4)

    def forward(self, patches: Tensor) -> Tensor:
        weights, ids = self.route(patches).topk(2, -1)
        weights = weights.softmax(-1)
        return moec.moe_experts(patches, ids, weights, self.up, self.down, transposed=True, interleaved=True)


def test_weights_get_the_one_layout() -> None:
    torch.manual_seed(0)
    model = Layouts().eval()
    graph, weights = trace(model, {"patches": torch.randn(5, 16)}, {"patches": {0: "N"}})
    assert graph.params["up"].type.shape == (4, 24, 16) and graph.params["down"].type.shape == (4, 16, 12)
    assert torch.equal(weights.load("up", 1)[:12], model.up[1].t()[0::2])  # gate rows first
    patches = torch.randn(9, 16)
    (found,) = Interpreter(graph, weights)(patches=patches)
    with torch.no_grad():
        assert (found - model(patches)).abs().max() < 1e-5


def test_wrong_argument_names_are_said() -> None:
    with pytest.raises(MoecError, match="has no argument 'serie'; it has series"):
        trace(Forecaster(), {"serie": torch.randn(1, 1, 24)})


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, moec; assert 'torch' not in sys.modules; moec.moe_experts; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
