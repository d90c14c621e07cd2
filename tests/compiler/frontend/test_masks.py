"""Masks that a model computes with become tensors of the same meaning as the attention op's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.compiler.frontend.masks import LazyMask, Mask, attention_under, merged
from moec.compiler.ops_attention import attention


@settings(max_examples=20, deadline=None)
@given(
    causal=st.booleans(),
    window=st.sampled_from([0, 1, 3]),
    chunk=st.sampled_from([0, 4]),
    softcap=st.sampled_from([0.0, 5.0]),
    groups=st.sampled_from([1, 2]),
    sinks=st.booleans(),
    as_numbers=st.booleans(),
)
def test_attention_under_a_tensor_is_the_attention_op(
    causal: bool, window: int, chunk: int, softcap: float, groups: int, sinks: bool, as_numbers: bool
) -> None:
    torch.manual_seed(window + 10 * chunk)
    q, k, v = torch.randn(2, 4, 9, 8), torch.randn(2, 4 // groups, 9, 8), torch.randn(2, 4 // groups, 9, 6)
    sink = torch.randn(4) if sinks else None
    seen = Mask(causal, window, chunk).tensor(9, 9, "cpu").expand(2, 1, -1, -1)
    mask = torch.zeros(seen.shape).masked_fill(~seen, -1e9) if as_numbers else seen
    found = attention_under(q, k, v, mask, None, sink, 0.3, softcap)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    expected = attention(q, k, v, sink, scale=0.3, causal=causal, window=window, chunk=chunk, softcap=softcap)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_bias_is_added_to_the_logits() -> None:
    q, k, v = torch.randn(3, 1, 2, 5, 4).unbind()
    bias, mask = torch.randn(1, 2, 5, 5), Mask(causal=True).tensor(5, 5, "cpu")
    expected = ((q @ k.transpose(2, 3) * 0.5 + bias).masked_fill(~mask, -torch.inf).softmax(-1) @ v).transpose(1, 2)
    torch.testing.assert_close(attention_under(q, k, v, mask, bias, None, 0.5, 0.0), expected)


def test_a_lazy_mask_is_a_tensor_where_one_is_needed() -> None:
    pattern = Mask(causal=True, window=2)
    lazy: Any = LazyMask(pattern, lambda: pattern.tensor(4, 4, "cpu").expand(1, 1, -1, -1))
    seen = pattern.tensor(4, 4, "cpu")
    assert lazy.dtype == torch.bool and lazy.shape == (1, 1, 4, 4)
    assert torch.equal(lazy[:, 0] & torch.ones(4, 4, dtype=torch.bool), seen[None])
    assert torch.equal(torch.ones(4, 4, dtype=torch.bool) & lazy[0, 0], seen)
    assert torch.equal(~lazy[0, 0], ~seen)
    assert torch.equal(torch.where(lazy[0, 0], 1.0, 0.0), seen.float())
    assert torch.equal(torch.zeros(4, 4).masked_fill(lazy[0, 0], 1.0), seen.float())


@pytest.mark.parametrize("window", [0, 3])
def test_a_mask_that_is_handed_on_stays_a_pattern(window: int) -> None:
    lazy = LazyMask(Mask(causal=True, window=window), lambda: pytest.fail("no tensor is needed"))
    assert merged(lazy[:, :, :, :7], True, window) == Mask(causal=True, window=window)
