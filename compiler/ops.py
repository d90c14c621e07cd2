"""The semantic ops: what each means, as a torch function.

A function here is the definition of its op: the interpreter runs it, the verifier runs it on the meta device to check shapes,
and every pass, kernel and backend is held against it. Inputs come first, in the order of `Node.inputs` (None where absent);
attributes follow as keywords.

Axes: B sequences, T tokens, E experts, K experts per token, D hidden size, F expert intermediate size, H heads,
HK key/value heads, d head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from moec.compiler.ops_attention import attention, linear_attention


class Stacked(Protocol):
    """A tensor with a leading expert axis, of which one expert at a time is needed (a `Tensor`, or a lazy stand-in)."""

    @property
    def shape(self) -> Sequence[int]: ...

    def __getitem__(self, expert: int) -> Tensor: ...


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """Rows of `weight` [V, D] at `ids` [...] -> [..., D]."""
    return F.embedding(ids, weight)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K] times weight [N, K] transposed, plus bias [N] -> [..., N]."""
    return F.linear(x, weight, bias)


def rms_norm(x: Tensor, weight: Tensor | None = None, *, eps: float, offset: float = 0.0) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (offset + weight) over the last axis. https://arxiv.org/abs/1910.07467"""
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return y if weight is None else y * (offset + weight) if offset else y * weight


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis. https://arxiv.org/abs/1607.06450"""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, halves rotated against each other: x [B, T, H, d], cos and sin [B, T, d].

    https://arxiv.org/abs/2104.09864, in the layout of GPT-NeoX: element i pairs with i + d/2.
    """
    low, high = x.chunk(2, -1)
    return x * cos.unsqueeze(2) + torch.cat((-high, low), -1) * sin.unsqueeze(2)


def router(
    logits: Tensor,
    bias: Tensor | None = None,
    *,
    top_k: int,
    score: str = "softmax",
    normalize: bool = False,
    scale: float = 1.0,
    groups: int = 1,
    top_groups: int = 1,
    group_score: str = "max",
) -> tuple[Tensor, Tensor]:
    """Choose K experts a token: logits [..., E] -> weights [..., K], ids [..., K] (int64), best first.

    Args:
        bias: [E], added to the scores for the choice only (https://arxiv.org/abs/2408.15664).
        score: `softmax` or `sigmoid` over all experts, `softmax_topk`: softmax over the chosen logits, or `identity`: the logits are
            scores already.
        normalize: divide the K weights by their sum.
        scale: factor on the weights.
        groups: experts come in this many groups of neighbours; only those of the best `top_groups` groups can be chosen.
        group_score: a group is as good as its best expert (`max`) or as its two best together (`top2`).
    """
    scores = _SCORES[score](logits)
    choice = scores if bias is None else scores + bias
    if groups > 1:
        grouped = choice.unflatten(-1, (groups, -1))  # [..., groups, E / groups]
        merit = grouped.amax(-1) if group_score == "max" else grouped.topk(2, -1).values.sum(-1)
        best = torch.zeros_like(merit).scatter(-1, merit.topk(top_groups, -1).indices, 1.0)
        choice = grouped.masked_fill(best.unsqueeze(-1) == 0, -torch.inf).flatten(-2)
    ids = choice.topk(top_k, -1).indices
    weights = scores.gather(-1, ids)
    if score == "softmax_topk":
        weights = weights.softmax(-1)
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights * scale, ids


def router_scores(logits: Tensor, score: str) -> Tensor:
    """What a router of this `score` compares: [..., E] -> [..., E]."""
    return _SCORES[score](logits)


_SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    "softmax_topk": lambda logits: logits,
    "identity": lambda logits: logits,
}


def skip(
    weights: Tensor,
    ids: Tensor,
    counts: Tensor | None = None,
    *,
    experts: int,
    ratio: float = 0.0,
    top_p: float = 1.0,
    normalize: bool = False,
) -> tuple[Tensor, Tensor]:
    """Fewer experts for tokens that need fewer: weights and ids (int64) [..., K], best first -> weights, ids [..., K].

    A slot that is skipped gets the id `experts` and the weight 0. The first slot never is; another one is if any rule says so. Rules
    compare the weights as they come, and NaN skips nothing.

    Args:
        counts: int64 [..., 1]: skip all slots but the first `counts` (one is kept in any case).
        experts: E; an id from here on means to `experts` that a slot is skipped.
        ratio: skip slots whose weight is less than this share of the first one's: the rule of https://arxiv.org/abs/2402.14800 and
            of ODP in https://arxiv.org/abs/2410.06270, which are for K = 2, with any K. 0 switches it off.
        top_p: skip slots before which the weights already add up to this share of their sum over all K
            (https://arxiv.org/abs/2403.07652). 1 switches it off.
        normalize: scale the weights that are left, so that their sum is that of all K.
    """
    if weights.shape != ids.shape or (counts is not None and counts.shape != (*ids.shape[:-1], 1)):
        raise ValueError(f"skip: weights {list(weights.shape)}, ids {list(ids.shape)} and counts (K = 1) do not fit each other")
    if not (0 <= ratio <= 1 and 0 < top_p <= 1):
        raise ValueError(f"skip: expected a ratio from 0 to 1 and a top_p above 0 and up to 1, got {ratio} and {top_p}")
    sums = _running_sums(weights)
    before, total = sums[..., :-1], sums[..., -1:]
    skipped = torch.zeros_like(ids, dtype=torch.bool)
    if ratio > 0:
        skipped |= weights < ratio * weights[..., :1]
    if top_p < 1:
        skipped |= before >= top_p * total
    at = torch.arange(ids.shape[-1], device=ids.device)
    if counts is not None:
        skipped |= at >= counts
    skipped &= at > 0
    kept = weights.masked_fill(skipped, 0)
    if normalize:
        left = _running_sums(kept)[..., -1:]
        kept = kept * torch.where(left == total, torch.ones_like(left), total / left)
    return kept, ids.masked_fill(skipped, experts)


def _running_sums(x: Tensor) -> Tensor:
    """The sums of the first 0, 1, ... K values [..., K + 1], added in order in the precision of x (`cumsum` may take a wider one)."""
    return torch.stack(list(accumulate(x.unbind(-1), torch.add, initial=torch.zeros_like(x[..., 0]))), -1)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "identity": lambda x: x,
}


def expert_activation(x: Tensor, *, activation: str, gated: bool = True, limit: float = 0.0) -> Tensor:
    """What an expert does between its two projections: x [..., 2F] (gate, then up) or [..., F] -> [..., F].

    Args:
        activation: a name of `ACTIVATIONS`, or `swiglu_oai`: (up + 1) * gate * sigmoid(1.702 * gate), as in gpt-oss.
        gated: the activation of the gate half multiplies the up half.
        limit: > 0: the gate is clamped to at most `limit` and the up half to [-limit, limit] first.
    """
    if not gated:
        return ACTIVATIONS[activation](x)
    gate, up = x.chunk(2, -1)
    if limit:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    if activation == "swiglu_oai":
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)
    return ACTIVATIONS[activation](gate) * up


def experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    up: Stacked,
    down: Stacked,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    up_left: Stacked | None = None,
    up_right: Stacked | None = None,
    down_left: Stacked | None = None,
    down_right: Stacked | None = None,
    *,
    activation: str,
    gated: bool = True,
    limit: float = 0.0,
) -> Tensor:
    """Each token through its K experts, summed by weight: x [..., D], ids and weights [..., K] -> [..., D].

    A slot whose id is outside of 0 to E - 1 is skipped: it adds nothing, and nothing of any weight is read for it. So a token can
    have fewer experts than K, or none (its result is then zero). See `skip`.

    Args:
        up: [E, 2F, D] with the gate rows before the up rows, or [E, F, D] when not gated.
        down: [E, D, F].
        up_bias, down_bias: [E, 2F] (or [E, F]) and [E, D].
        up_left, up_right: low-rank factors [E, 2F, r] (or [E, F, r]) and [E, r, D]: an expert's matrix is up + up_left up_right.
        down_left, down_right: the same for down, [E, D, s] and [E, s, F].
        activation, gated, limit: as in `expert_activation`.
    """
    if x.is_meta:
        hidden = up.shape[1] // 2 if gated else up.shape[1]
        if (down.shape[1], down.shape[2], up.shape[2]) != (x.shape[-1], hidden, x.shape[-1]):
            raise ValueError(f"experts: up {list(up.shape)} and down {list(down.shape)} do not fit x {list(x.shape)}")
        for matrix, left, right in ((up, up_left, up_right), (down, down_left, down_right)):
            _check_factors(matrix, left, right)
        return torch.empty_like(x)
    flat, flat_ids, flat_weights = x.flatten(0, -2), ids.flatten(0, -2), weights.flatten(0, -2)
    result = torch.zeros_like(flat)
    for expert in flat_ids[(flat_ids >= 0) & (flat_ids < up.shape[0])].unique().tolist():
        token, slot = torch.where(flat_ids == expert)
        h = _project(flat[token], expert, up, up_bias, up_left, up_right)
        h = expert_activation(h, activation=activation, gated=gated, limit=limit)
        h = _project(h, expert, down, down_bias, down_left, down_right)
        result.index_add_(0, token, h * flat_weights[token, slot, None])
    return result.view_as(x)


def _project(x: Tensor, expert: int, matrix: Stacked, bias: Tensor | None, left: Stacked | None, right: Stacked | None) -> Tensor:
    y = F.linear(x, matrix[expert], None if bias is None else bias[expert])
    return y if left is None or right is None else y + F.linear(F.linear(x, right[expert]), left[expert])


def _check_factors(matrix: Stacked, left: Stacked | None, right: Stacked | None) -> None:
    if left is None and right is None:
        return
    if left is None or right is None:
        raise ValueError("experts: a matrix has one low-rank factor; it must have both or none")
    e, n, k = matrix.shape
    if tuple(left.shape) != (e, n, right.shape[1]) or tuple(right.shape) != (e, left.shape[2], k):
        raise ValueError(f"experts: factors {list(left.shape)} and {list(right.shape)} do not fit a matrix {list(matrix.shape)}")


EXPERT_MATRICES = (3, 4, 7, 8, 9, 10)
"""Inputs of `experts` that are matrices, one an expert: up, down, and the low-rank factors of both."""

OPS: dict[str, Callable[..., Any]] = {
    op.__name__: op for op in (embedding, linear, rms_norm, layer_norm, rope, attention, linear_attention, router, skip, experts)
}
"""The semantic ops by name."""
