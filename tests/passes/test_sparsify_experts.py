"""Zeros where the score is lowest, as many as were asked for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.compiler.errors import MoecError
from moec.passes.sparsify_experts import SparsifyExperts
from tests import graphs

UP, DOWN = "layers.0.experts.up", "layers.0.experts.down"


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 4), m=st.integers(4, 8), rows=st.integers(1, 5), width=st.integers(1, 40), seed=st.integers(0, 99))
def test_patterns_keep_the_best_of_each_group(n: int, m: int, rows: int, width: int, seed: int) -> None:
    score = torch.rand(rows, width, generator=torch.Generator().manual_seed(seed))
    mask = SparsifyExperts(sparsity=f"{n}:{m}").mask(score)
    for start in range(0, width, m):
        group, kept = score[:, start : start + m], mask[:, start : start + m]
        wanted = group >= group.sort(1, descending=True).values[:, min(n, group.shape[1]) - 1 : min(n, group.shape[1])]
        assert torch.equal(kept, wanted)


def test_the_lowest_scores_of_each_row_go() -> None:
    model = graphs.model()
    context = graphs.context(model)
    found = SparsifyExperts(sparsity=0.5).run(model, context)
    layer = context.statistics(model, "test").layer("e")
    for name, square in ((UP, layer.weighted_input_square), (DOWN, layer.weighted_hidden_square)):
        before, after = model.load(name), found.load(name)
        score = before.abs() * square.sqrt().float()[:, None]
        assert torch.equal((after == 0).sum(2), torch.full(after.shape[:2], before.shape[2] // 2))
        assert torch.equal(after[after != 0], before[after != 0])
        lowest_kept = score.masked_fill(after == 0, torch.inf).amin(2)
        assert bool((score.masked_fill(after != 0, -torch.inf).amax(2) <= lowest_kept).all())


@pytest.mark.parametrize("sparsity", [1.0, -0.1, "3:2", "half"])
def test_bad_sparsity(sparsity: float | str) -> None:
    with pytest.raises(MoecError, match="expected"):
        SparsifyExperts(sparsity=sparsity)
