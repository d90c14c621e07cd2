"""Surgery on routers: against the definition of a layer written out, and through both backends."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moec.compiler.errors import MoecError
from moec.compiler.interpreter import Interpreter
from moec.compiler.layers import MoeLayer, keep_experts, moe_layers
from moec.compiler.model import Model
from moec.compiler.ops import expert_activation
from moec.compiler.regroup import map_experts, mask_experts, tie_experts, with_top_k
from moec.compiler.roles import parameter_roles
from moec.compiler.text import parse_graph, print_graph
from moec.compiler.verify import verify
from moec.compiler.weights import constant
from tests import graphs
from tests.compiler.backends.tvm_model import Compiled
from tests.onnx_model import build

E = 6
NORMALIZED = ['score="softmax", normalize=true', 'score="softmax_topk"', 'score="sigmoid"', 'score="identity", normalize=true']


def source(seed: int = 0, router: str = 'score="softmax", normalize=true', *, whole: bool = False) -> Model:
    """The small model (or what its MoE layer adds, unless `whole`) with a router of other attributes."""
    text = graphs.MOE.replace('score="softmax", normalize=true', router)
    graph = parse_graph(text if whole else text.replace("return %out", "return %e"))
    graph = graph.with_nodes(graph.nodes)
    return Model(graph, graphs.random_weights(graph, seed))


def layer_of(model: Model) -> MoeLayer:
    (layer,) = moe_layers(model.graph)
    return layer


def run(model: Model, seed: int = 0) -> Tensor:
    ids = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(seed))
    return Interpreter(model.graph, model.weights, dtype=torch.float64)(ids=ids, positions=torch.arange(9).expand(2, -1))[0]


def written_out(model: Model, scores: Tensor, up: Tensor, down: Tensor, x: Tensor, *, normalize: bool, top_k: int = 2) -> Tensor:
    """A layer by its definition: the best scores [..., E'], and the sum over experts."""
    best = scores.topk(top_k, -1)
    weights = best.values / best.values.sum(-1, keepdim=True) if normalize else best.values
    result = torch.zeros_like(x)
    for k in range(top_k):
        for e in range(len(up)):
            hidden = expert_activation(x @ up[e].T, activation="silu")
            result += torch.where(best.indices[..., k, None] == e, weights[..., k, None] * (hidden @ down[e].T), 0)
    return result


def inputs(model: Model, seed: int) -> tuple[Tensor, Tensor]:
    """What enters the MoE layer, and its router's logits."""
    graph = model.graph.with_nodes(model.graph.nodes, ["h1", "logits"])
    ids = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(seed))
    x, logits = Interpreter(graph, model.weights, dtype=torch.float64)(ids=ids, positions=torch.arange(9).expand(2, -1))
    return x, logits


def stacks(model: Model) -> tuple[Tensor, Tensor]:
    return model.load("layers.0.experts.up").double(), model.load("layers.0.experts.down").double()


subsets = st.lists(st.integers(0, E - 1), min_size=2, max_size=E, unique=True)


@settings(max_examples=10, deadline=None)
@given(keep=subsets, seed=st.integers(0, 99))
def test_masked_experts_keep_their_shares_of_the_softmax(keep: list[int], seed: int) -> None:
    model = source(seed, 'score="softmax", normalize=false')
    x, logits = inputs(model, seed)
    up, down = stacks(model)
    expected = written_out(model, logits.softmax(-1)[..., keep], up[keep], down[keep], x, normalize=False)
    masked = mask_experts(model, layer_of(model), keep, "test")
    torch.testing.assert_close(run(masked, seed), expected)
    assert layer_of(masked).count == len(keep)


@settings(max_examples=10, deadline=None)
@given(
    keep=subsets, seed=st.integers(0, 99), router=st.sampled_from(NORMALIZED),
)  # fmt: skip
def test_where_weights_are_normalised_rows_mask_and_matrix_agree(keep: list[int], seed: int, router: str) -> None:
    model = source(seed, router)
    layer = layer_of(model)
    assert layer.normalized
    rows = torch.eye(E)[keep]
    sliced = run(keep_experts(model, layer, keep, "test"), seed)
    torch.testing.assert_close(run(mask_experts(model, layer, keep, "test"), seed), sliced)
    torch.testing.assert_close(run(map_experts(model, layer, rows, rows, "test"), seed), sliced)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 999), kept=st.integers(2, E), normalize=st.booleans())
def test_matrices_of_experts_and_scores(seed: int, kept: int, normalize: bool) -> None:
    model = source(seed, f'score="softmax", normalize={str(normalize).lower()}')
    generator = torch.Generator().manual_seed(seed)
    merge, route = (torch.eye(E)[:kept] + 0.1 * torch.randn(kept, E, generator=generator) for _ in range(2))
    x, logits = inputs(model, seed)
    up, down = (torch.einsum("je,enk->jnk", merge.double(), stack) for stack in stacks(model))
    expected = written_out(model, logits.softmax(-1) @ route.double().T, up, down, x, normalize=normalize)
    found = run(map_experts(model, layer_of(model), merge, route, "test"), seed)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)  # merged weights are float32


def test_rows_that_lead_to_one_expert_add_up() -> None:
    model = source()
    table, (up, down) = torch.tensor([0, 1, 0, 2, 1, 2]), stacks(model)
    edits = {"layers.0.experts.up": constant(up[[0, 1, 3]].float()), "layers.0.experts.down": constant(down[[0, 1, 3]].float())}
    x, logits = inputs(model, 0)
    expected = written_out(model, logits.softmax(-1), up[[0, 1, 0, 3, 1, 3]], down[[0, 1, 0, 3, 1, 3]], x, normalize=True)
    torch.testing.assert_close(run(tie_experts(model, layer_of(model), table, edits)), expected)


def rewritten(how: str) -> Model:
    model = source(3, 'score="softmax", normalize=false', whole=True)
    layer = layer_of(model)
    if how == "mask":
        return mask_experts(model, layer, [4, 0, 3], "test")
    generator = torch.Generator().manual_seed(0)
    merge, route = (torch.eye(E)[:4] + 0.05 * torch.randn(4, E, generator=generator) for _ in range(2))
    if how == "map":
        return map_experts(model, layer, merge, route, "test")
    model = Model(with_top_k(model.graph, layer, 1, "test"), model.weights)
    return map_experts(model, layer_of(model), merge, route, "test")


@pytest.mark.parametrize("how", ["mask", "one expert a token"])
def test_both_backends_run_them(how: str, tmp_path: Path) -> None:
    model = rewritten(how)
    verify(model.graph)
    assert parse_graph(print_graph(model.graph)) == model.graph
    (tmp_path / "tvm").mkdir()
    compiled = Compiled(model.graph, model.weights, tmp_path / "tvm")
    built = build(model.graph, model.weights, tmp_path / "onnx")
    executor = built.executor()
    ids = np.random.default_rng(1).integers(0, 40, 30)
    positions = torch.arange(30)[None]
    expected = Interpreter(model.graph, model.weights)(ids=torch.from_numpy(ids)[None], positions=positions)[0][0].numpy()
    np.testing.assert_allclose(compiled.logits(ids), expected, atol=1e-4)
    np.testing.assert_allclose(executor.forward([(executor.add(), ids)], all_logits=True), expected, atol=1e-4)


def test_roles_of_a_mapped_router() -> None:
    roles = parameter_roles(rewritten("map").graph)
    assert (roles["layers.0.gate.weight"], roles["e.map"], roles["layers.0.o.weight"]) == ("router", "router", "linear")


def test_errors() -> None:
    model = source()
    layer = layer_of(model)
    with pytest.raises(MoecError, match="chooses 2 experts a token and would have 1"):
        mask_experts(model, layer, [3], "test")
    masked = mask_experts(model, layer, [1, 2, 3], "test")
    for again in (mask_experts, keep_experts):
        with pytest.raises(MoecError, match="more rows than there are experts"):
            again(masked, layer_of(masked), [0, 1], "test")
    grouped = source(0, 'score="sigmoid", groups=3, top_groups=1')
    with pytest.raises(MoecError, match="2 experts from 1 of 3 groups, which would have .1, 2, 2. experts"):
        mask_experts(grouped, layer_of(grouped), [0, 1, 2, 3, 4], "test")
    with pytest.raises(MoecError, match="chooses among groups"):
        map_experts(grouped, layer_of(grouped), torch.eye(E), torch.eye(E), "test")
