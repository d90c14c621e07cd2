"""The op skip: its rules against plain arithmetic, and a model with it in the interpreter and through the TVM backend."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.compiler import ops
from moec.compiler.ir import Graph
from moec.compiler.roles import parameter_roles
from moec.compiler.text import parse_graph, print_graph
from moec.compiler.verify import VerifyError, verify
from tests.compiler.backends.tvm_model import Compiled
from tests.graphs import MOE, random_weights


@settings(max_examples=40, deadline=None)
@given(
    weights=st.lists(st.floats(0.01, 1), min_size=1, max_size=8), ratio=st.floats(0, 1), top_p=st.floats(0.05, 1),
    count=st.none() | st.integers(-1, 9), normalize=st.booleans(),
)  # fmt: skip
def test_rules(weights: list[float], ratio: float, top_p: float, count: int | None, normalize: bool) -> None:
    weights = sorted(weights, reverse=True)
    kept = [
        k == 0
        or not (
            (ratio > 0 and w < ratio * weights[0])
            or (top_p < 1 and sum(weights[:k]) >= top_p * sum(weights))
            or (count is not None and k >= count)
        )
        for k, w in enumerate(weights)
    ]
    factor = sum(weights) / sum(w for w, k in zip(weights, kept, strict=True) if k) if normalize else 1.0
    found, ids = ops.skip(
        torch.tensor(weights).double(), torch.arange(len(weights)), None if count is None else torch.tensor([count]), experts=99,
        ratio=ratio, top_p=top_p, normalize=normalize,
    )  # fmt: skip
    assert ids.tolist() == [i if k else 99 for i, k in enumerate(kept)]
    assert found.tolist() == pytest.approx([w * factor if k else 0.0 for w, k in zip(weights, kept, strict=True)], rel=1e-6)


def test_published_rules_by_hand() -> None:
    weights, ids = torch.tensor([[0.6, 0.4], [0.75, 0.25], [0.5, 0.5]]), torch.tensor([[3, 1], [0, 2], [1, 0]])
    kept, found = ops.skip(weights, ids, experts=4, ratio=0.5, normalize=True)  # NAEE: the second below half of the first
    assert found.tolist() == [[3, 1], [0, 4], [1, 0]]
    assert torch.equal(kept, torch.tensor([[0.6, 0.4], [1.0, 0.0], [0.5, 0.5]]))
    _, found = ops.skip(weights, ids, experts=4, top_p=0.5)  # as many as reach half of the mass
    assert found.tolist() == [[3, 4], [0, 4], [1, 4]]


def test_weights_of_zero_stay_zero() -> None:
    kept, _ = ops.skip(torch.zeros(1, 3), torch.tensor([[0, 1, 2]]), experts=3, ratio=0.5, normalize=True)
    assert kept.tolist() == [[0.0, 0.0, 0.0]]


SKIP = "  %sw: f32[B, T, 2], %si: i64[B, T, 2] = skip(%w, %i{}) {{experts=6, ratio=0.9, top_p=0.95, normalize=true}}\n"
COUNTS = """  %cl: f32[B, T, 2] = linear(%h1, @layers.0.count.weight)
  %ca: i64[B, T, 1] = aten.argmax.default(%cl) {dim=-1, keepdim=true}
  %c: i64[B, T, 1] = aten.add.Tensor(%ca) {other=1}
"""


def graph(counts: bool) -> Graph:
    """The small model, whose tokens may skip the second expert."""
    lines = (COUNTS if counts else "") + SKIP.format(", %c" if counts else "")
    text = MOE.replace("  %e: f32", lines + "  %e: f32").replace("experts(%h1, %i, %w,", "experts(%h1, %si, %sw,")
    if counts:
        text = text.replace("  param @norm.w", "  param @layers.0.count.weight: f32[2, 16] as f32\n  param @norm.w")
    return parse_graph(text)


@pytest.mark.parametrize("counts", [False, True])
def test_a_model_that_skips(counts: bool, tmp_path: Path) -> None:
    model = graph(counts)
    verify(model)
    assert parse_graph(print_graph(model)) == model
    compiled = Compiled(model, random_weights(model), tmp_path)
    rng = np.random.default_rng(1)
    for length in (50, 1):
        ids = rng.integers(0, 40, length)
        np.testing.assert_allclose(compiled.logits(ids), compiled.expected(ids), atol=1e-4)


def test_a_projection_that_counts_experts_is_a_router() -> None:
    assert parameter_roles(graph(counts=True))["layers.0.count.weight"] == "router"


def test_the_verifier_rejects() -> None:
    text = print_graph(graph(counts=False))
    for old, new, message in (("ratio=0.9", "ratio=1.5", "expected a ratio"), ("skip(%w, %i)", "skip(%w, %i, %i)", "do not fit")):
        assert old in text
        with pytest.raises(VerifyError, match=message):
            verify(parse_graph(text.replace(old, new)))
