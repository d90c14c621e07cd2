"""Experts with low-rank factors in both backends, against the interpreter; sizes on disk, and artifacts read back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from moec.compiler.interpreter import Interpreter
from moec.compiler.model import Model
from moec.compiler.split_experts import uniform_experts
from moec.compiler.stored import as_stored
from moec.passes.low_rank import LowRank
from moec.passes.quantize import Quantize
from tests import graphs
from tests.compiler.backends.tvm_model import Compiled
from tests.onnx_model import build


def models() -> dict[str, Model]:
    """Quantised models with corrections, one whose experts have several ranks, and the latter quantised."""
    source = graphs.model()
    context = graphs.context(source)
    ranks = LowRank(0.6, (1, 0.7, 0.4), "expert", multiple=1).run(source, context)
    return {
        "corrected": Quantize(experts="int4_g32", low_rank={"rank": 3}).run(source, context),
        "ternary": Quantize(experts="ternary_g32", low_rank={"rank": 3, "rounds": 1}).run(source, context),
        "ranks": ranks,
        "quantised": Quantize(experts="int8_channel").run(ranks, context),
    }


CASES = [(name, backend) for name in ("corrected", "ternary", "ranks", "quantised") for backend in ("tvm", "onnx", "portable")]


@pytest.mark.parametrize(("name", "backend"), [case for case in CASES if case != ("quantised", "tvm")])
def test_prefill_and_decode(name: str, backend: str, tmp_path: Path) -> None:
    model = uniform_experts(models()[name])
    ids = np.random.default_rng(2).integers(0, 40, 11)
    stored = as_stored(model)
    wanted = Interpreter(stored.graph, stored.weights)(ids=torch.from_numpy(ids)[None], positions=torch.arange(11)[None])[0][0].numpy()
    if backend == "tvm":
        executor = Compiled(model.graph, model.weights, tmp_path).executor
    else:
        executor = build(model.graph, model.weights, tmp_path, portable=backend == "portable").executor()  # type: ignore[assignment]  # both are executors
    handle = executor.add()
    prefill = executor.forward([(handle, ids[:10])], all_logits=True)
    step = executor.forward([(handle, ids[10:])])
    np.testing.assert_allclose(np.concatenate([prefill, step]), wanted, atol=2e-3)
