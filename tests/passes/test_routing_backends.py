"""What the routing passes write, compiled: the logits are the interpreter's, and experts that are skipped do not run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from moec.compiler.interpreter import Interpreter
from moec.compiler.model import Model
from moec.compiler.passes import Pass, run_passes
from moec.passes.mask_router import MaskRouterPass
from moec.passes.pre_gate import PreGate
from moec.passes.skip_experts import SkipExperts
from moec.passes.top_k import TopK
from moec.passes.zero_experts import ZeroExperts
from tests import graphs
from tests.compiler.backends.tvm_model import Compiled
from tests.onnx_model import build
from tests.passes.routing_models import model

STEPS: dict[str, list[Pass]] = {
    "protected": [SkipExperts(rule="top_p", target=0.3, protect=0.1, per_layer=False, normalize=True)],
    "learned": [MaskRouterPass(target=0.3, joint_steps=0, local_steps=5)],
    "free": [TopK(k=4), ZeroExperts(fraction=0.4, kind="mixed"), PreGate()],
    "early": [PreGate(mode="replace", steps=5), SkipExperts(rule="ratio", target=0.2), ZeroExperts(experts={1: [3]}, kind="copy")],
}


def expected(subject: Model, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """The interpreter's logits [T, V]."""
    inputs = {"ids": torch.from_numpy(ids)[None], "positions": torch.arange(len(ids))[None]}
    found: NDArray[np.float32] = Interpreter(subject.graph, subject.weights)(**inputs)[0][0].numpy()
    return found


@pytest.mark.parametrize("name", STEPS)
def test_tvm(name: str, tmp_path: Path) -> None:
    subject = model()
    changed = run_passes(subject, STEPS[name], graphs.context(subject))
    compiled = Compiled(changed.graph, changed.weights, tmp_path)
    rng = np.random.default_rng(1)
    for length in (40, 1):
        ids = rng.integers(0, 40, length)
        np.testing.assert_allclose(compiled.logits(ids), expected(changed, ids), atol=1e-4)


@pytest.mark.parametrize("name", STEPS)
def test_onnx(name: str, tmp_path: Path) -> None:
    subject = model()
    changed = run_passes(subject, STEPS[name], graphs.context(subject))
    built = build(changed.graph, changed.weights, tmp_path)
    executor = built.executor()
    ids = np.random.default_rng(1).integers(0, 40, 20)
    found = executor.forward([(executor.add(), ids)], all_logits=True)
    np.testing.assert_allclose(found, expected(changed, ids), atol=1e-4)
