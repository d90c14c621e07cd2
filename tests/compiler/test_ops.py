"""The semantic ops against answers worked out another way."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.compiler import ops, ops_attention


def silu(x: float) -> float:
    return x / (1 + math.exp(-x))


def test_a_mixture_by_hand() -> None:
    # Expert e scales its gate by e + 1 and passes up through; down is the identity: expert e gives silu((e + 1) x) * x.
    eye = torch.eye(2)
    up = torch.stack([torch.cat((eye * (e + 1), eye)) for e in range(3)])
    down = torch.stack([eye] * 3)
    x = torch.tensor([[1.0, -2.0]])
    result = ops.experts(x, torch.tensor([[0, 2]]), torch.tensor([[0.25, 0.75]]), up, down, activation="silu")
    expected = [0.25 * silu(1 * v) * v + 0.75 * silu(3 * v) * v for v in (1.0, -2.0)]
    assert torch.allclose(result, torch.tensor([expected]))


def test_gpt_oss_activation_by_hand() -> None:
    gate, up = 9.0, -8.0  # clamped to 7 and -7
    expected = (-7 + 1) * 7 / (1 + math.exp(-1.702 * 7))
    result = ops.expert_activation(torch.tensor([gate, up]), activation="swiglu_oai", limit=7.0)
    assert result.item() == pytest.approx(expected)


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 5), experts=st.integers(2, 6), hidden=st.integers(1, 5), width=st.integers(1, 4),
    activation=st.sampled_from([*ops.ACTIVATIONS]), gated=st.booleans(), bias=st.booleans(), seed=st.integers(0, 999),
)  # fmt: skip
def test_experts_is_the_dense_sum(
    tokens: int, experts: int, hidden: int, width: int, activation: str, gated: bool, bias: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    rows = 2 * width if gated else width
    up, down = torch.randn(experts, rows, hidden).double(), torch.randn(experts, hidden, width).double()
    up_bias = torch.randn(experts, rows).double() if bias else None
    down_bias = torch.randn(experts, hidden).double() if bias else None
    x = torch.randn(tokens, hidden).double()
    ids = torch.stack([torch.randperm(experts)[:2] for _ in range(tokens)])
    weights = torch.rand(tokens, 2).double()
    h = torch.einsum("td,efd->tef", x, up) + (0 if up_bias is None else up_bias)
    h = torch.einsum("tef,edf->ted", ops.expert_activation(h, activation=activation, gated=gated), down)
    h = h + (0 if down_bias is None else down_bias)
    expected = (h * torch.zeros(tokens, experts).double().scatter(1, ids, weights).unsqueeze(-1)).sum(1)
    found = ops.experts(x, ids, weights, up, down, up_bias, down_bias, activation=activation, gated=gated)
    assert torch.allclose(found, expected)


@settings(max_examples=40, deadline=None)
@given(heads=st.sampled_from([(4, 4), (4, 2), (6, 1)]), tokens=st.integers(1, 9), seed=st.integers(0, 99))
def test_attention_is_sdpa(heads: tuple[int, int], tokens: int, seed: int) -> None:
    torch.manual_seed(seed)
    q, k, v = (torch.randn(2, tokens, h, d).double() for h, d in ((heads[0], 8), (heads[1], 8), (heads[1], 5)))
    k_, v_ = (t.repeat_interleave(heads[0] // heads[1], 2).transpose(1, 2) for t in (k, v))
    expected = F.scaled_dot_product_attention(q.transpose(1, 2), k_, v_, is_causal=True, scale=0.3).transpose(1, 2)
    assert torch.allclose(ops_attention.attention(q, k, v, scale=0.3), expected)


def test_attention_sees_what_it_may() -> None:
    """With values that are one-hot in the position, the result is the attention pattern."""
    tokens = 7
    q = k = torch.zeros(1, tokens, 1, 4)
    v = torch.eye(tokens).view(1, tokens, 1, tokens)
    window = ops_attention.attention(q, k, v, scale=1.0, window=3)[0, :, 0] > 0
    assert window[6].tolist() == [False] * 4 + [True] * 3
    chunk = ops_attention.attention(q, k, v, scale=1.0, chunk=3)[0, :, 0] > 0
    assert chunk[4].tolist() == [False] * 3 + [True] * 2 + [False] * 2
    sinks = ops_attention.attention(q, k, v, torch.tensor([math.log(2.0)]), scale=1.0)[0, :, 0]
    assert sinks[1].tolist() == pytest.approx([0.25, 0.25] + [0.0] * 5)  # 1, 1 and a sink of 2


def test_router_by_hand() -> None:
    logits = torch.tensor([math.log(v) for v in (1.0, 2.0, 3.0, 4.0)])
    cases: list[tuple[dict[str, Any], list[int], list[float]]] = [
        ({}, [3, 2], [0.4, 0.3]),
        ({"normalize": True}, [3, 2], [4 / 7, 3 / 7]),
        ({"score": "softmax_topk", "scale": 2.0}, [3, 2], [8 / 7, 6 / 7]),
        ({"score": "sigmoid"}, [3, 2], [0.8, 0.75]),
        ({"groups": 2, "top_groups": 1}, [3, 2], [0.4, 0.3]),
    ]
    for options, ids, weights in cases:
        found = ops.router(logits, top_k=2, **options)
        assert found[1].tolist() == ids, options
        assert found[0].tolist() == pytest.approx(weights), options
    bias = torch.tensor([9.0, 0, 0, 0])  # decides who is chosen, not with what weight
    assert ops.router(logits, bias, top_k=2)[0].tolist() == pytest.approx([0.1, 0.4])
    # Groups (1, 2) and (3, 4) with a bias on the first: its two best together win though 4 is the best expert.
    bias = torch.tensor([0.25, 0.25, 0.0, 0.0])
    assert ops.router(logits, bias, top_k=2, groups=2, group_score="top2")[1].tolist() == [1, 0]
    assert ops.router(logits, bias, top_k=2, groups=2, group_score="max")[1].tolist() == [1, 0]
