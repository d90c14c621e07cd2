"""Fusions in the TVM backend: nodes that are lowered together, when a value of theirs is first asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moec.compiler.backends.tvm.cpu import CpuPlatform
from moec.compiler.backends.tvm.fusion import Fusion, disjoint, read_outside
from moec.compiler.backends.tvm.lower import FunctionLowering
from moec.compiler.backends.tvm.semantic import SEMANTIC
from moec.compiler.ir import Graph, Node
from moec.runtime.tvm_functions import Function
from tests.compiler.backends.tvm_model import Compiled
from tests.graphs import moe, random_weights


@dataclass
class Together:
    """Nodes one after the other, all when the first value is asked for."""

    nodes: Sequence[Node]
    lowered: list[str]

    def lower(self, low: FunctionLowering) -> None:
        self.lowered += [node.name for node in self.nodes]
        for node in self.nodes:
            SEMANTIC[node.op](low, node)


def test_a_fusion_is_lowered_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lowered: list[str] = []

    def fusions(self: CpuPlatform, graph: Graph, storage: Mapping[str, Any], function: Function) -> Sequence[Fusion]:
        router = next(node for node in graph.nodes if node.op == "router")
        logits = next(node for node in graph.nodes if node.name == router.inputs[0])
        experts = next(node for node in graph.nodes if node.op == "experts")
        return [Together([logits, router], lowered), Together([experts], lowered)] if function.tokens == 1 else []

    graph = moe()
    monkeypatch.setattr(CpuPlatform, "fusions", fusions)
    model = Compiled(graph, random_weights(graph), tmp_path)
    ids = np.random.default_rng(0).integers(0, model.executor.vocab_size, 9)
    sequence = model.executor.add()
    found = np.concatenate([model.executor.forward([(sequence, ids[i : i + 1])]) for i in range(len(ids))])
    np.testing.assert_allclose(found, model.expected(ids), atol=1e-4)
    assert [name for name in lowered if lowered.count(name) != 1] == []
    assert len(lowered) == 3


def test_no_node_is_in_two_fusions() -> None:
    a, b, c = (node for node in moe().nodes[:3])
    first, second, third = Together([a, b], []), Together([b], []), Together([c], [])
    assert disjoint([first, second, third]) == [first, third]


def test_what_is_read_outside() -> None:
    graph = moe()
    router = next(node for node in graph.nodes if node.op == "router")
    experts = next(node for node in graph.nodes if node.op == "experts")
    assert read_outside(graph, [router]) == {value.name for value in router.outputs}
    assert read_outside(graph, [router, experts]) == {experts.name}
