"""A layer of mixed formats: one node a combination of formats, the same function, every expert stored once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.compiler.interpreter import Interpreter
from moec.compiler.model import Model
from moec.compiler.plan import make_plan, param_bytes
from moec.compiler.quantization import QuantizedWeights
from moec.compiler.quantizers import get_quantizer
from moec.compiler.recipe import NOTHING
from moec.compiler.split_experts import split_experts, uniform_experts
from moec.compiler.verify import verify
from moec.targets import get_target
from tests import graphs
from tests.compiler.backends.tvm_model import Compiled
from tests.onnx_model import build

STACKS = ("layers.0.experts.up", "layers.0.experts.down")
FORMATS = (
    ("int2_g32", "int4_g32", "int4_g32", "f32", "int3_g32", "int2_g32"),
    ("int4_g32", "int4_g32", "int4_g32", "f32", "int4_g32", "int4_g32"),
)


def mixed() -> Model:
    """A layer whose experts have four combinations of formats."""
    model = graphs.model()
    params = [replace(model.graph.params[name], format=formats) for name, formats in zip(STACKS, FORMATS, strict=True)]
    graph = model.graph.with_params(params)
    return Model(graph, QuantizedWeights(model.weights, graph, {name: get_quantizer("rtn") for name in STACKS}))


def logits(model: Model, ids: torch.Tensor) -> torch.Tensor:
    return Interpreter(model.graph, model.weights)(ids=ids, positions=torch.arange(ids.shape[1]).expand(ids.shape))[0]


def test_the_function_and_the_bytes_stay() -> None:
    model = mixed()
    split = uniform_experts(model)
    verify(split.graph)
    assert sum(node.op == "experts" for node in split.graph.nodes) == 4
    assert all(isinstance(p.format, str) for p in split.graph.params.values())
    stacks = [p for p in split.graph.params.values() if ".part" in p.name and p.type.dtype == "f32"]
    assert sum(map(param_bytes, stacks)) == sum(param_bytes(model.graph.params[name]) for name in STACKS)
    ids = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(logits(split, ids), logits(model, ids), rtol=1e-5, atol=1e-5)


def test_only_layers_with_factors_are_split_where_others_run_mixed() -> None:
    model = mixed()
    assert uniform_experts(model, factored_only=True) is model
    factored = graphs.factored(graphs.model())
    params = [replace(factored.graph.params[name], format=formats) for name, formats in zip(STACKS, FORMATS, strict=True)]
    split = uniform_experts(Model(factored.graph.with_params(params), factored.weights), factored_only=True)
    assert sum(node.op == "experts" for node in split.graph.nodes) == 4


def test_one_format_stays_one_node() -> None:
    model = graphs.model()
    same = [replace(model.graph.params[name], format=("int4_g32",) * 6) for name in STACKS]
    found = uniform_experts(Model(model.graph.with_params(same), model.weights)).graph
    assert [n.op for n in found.nodes] == [n.op for n in model.graph.nodes]
    assert {found.params[name].format for name in STACKS} == {"int4_g32"}


@settings(max_examples=15, deadline=None)
@given(parts=st.lists(st.integers(0, 3), min_size=6, max_size=6), seed=st.integers(0, 99))
def test_any_partition_is_the_same_function(parts: list[int], seed: int) -> None:
    model = graphs.model(seed)
    groups = [[e for e in range(6) if parts[e] == part] for part in sorted(set(parts))]
    node = next(n for n in model.graph.nodes if n.op == "experts")
    split = split_experts(model, node, groups)
    ids = torch.randint(0, 40, (1, 7), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(logits(split, ids), logits(model, ids), rtol=1e-5, atol=1e-5)


def test_both_backends_run_mixed_formats(tmp_path: Path) -> None:
    model = mixed()
    split = uniform_experts(model)
    ids = np.random.default_rng(2).integers(0, 40, 11)
    wanted = logits(model, torch.from_numpy(ids)[None])[0].numpy()
    for name in ("tvm", "onnx"):
        (tmp_path / name).mkdir()
        if name == "tvm":
            executor = Compiled(split.graph, split.weights, tmp_path / name).executor
        else:
            executor = build(split.graph, split.weights, tmp_path / name).executor()  # type: ignore[assignment]  # both are executors
        handle = executor.add()
        prefill = executor.forward([(handle, ids[:10])], all_logits=True)
        step = executor.forward([(handle, ids[10:])])
        # int2 experts: ONNX Runtime computes them with activations rounded to 8 bits
        np.testing.assert_allclose(np.concatenate([prefill, step]), wanted, atol=2e-3 if name == "tvm" else 0.2)


def test_a_token_reads_as_many_experts_as_before() -> None:
    model = graphs.model()
    node = next(n for n in model.graph.nodes if n.op == "experts")
    whole, split = (
        make_plan(m.graph, NOTHING, get_target("cpu"), None) for m in (model, split_experts(model, node, [[0, 2, 3], [1, 4, 5]]))
    )
    tables = 2 * 8 * 7
    assert split.bytes_per_token == whole.bytes_per_token + tables
    assert split.weight_bytes == whole.weight_bytes + tables
