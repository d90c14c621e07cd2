"""The semantic ops that mix tokens: what each means, as a torch function. See `moec.compiler.ops`.

Axes: B sequences, T tokens, H heads, HK key/value heads, d head size of queries and keys, dv of values.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None = None,
    *,
    scale: float,
    causal: bool = True,
    window: int = 0,
    chunk: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """Attention of each token over its sequence: q [B, T, H, d], k [B, T, HK, d], v [B, T, HK, dv] -> [B, T, H, dv].

    Head h reads key/value head h // (H // HK). Backends keep k and v of earlier tokens in a cache; the meaning is that of the
    whole sequence at once.

    Args:
        sinks: [H], a logit a head that takes part in the softmax and adds nothing to the result.
        scale: factor on q @ k.
        causal: a token sees itself and earlier tokens only.
        window: > 0: a token sees the `window` latest tokens only, itself included.
        chunk: > 0: a token sees the tokens of its own block of `chunk` tokens only.
        softcap: > 0: logits become softcap * tanh(logits / softcap).
    """
    tokens, groups = q.shape[1], q.shape[2] // k.shape[2]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, H, T, d]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    logits = q @ k.transpose(2, 3) * scale  # [B, H, T, T]
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    at = torch.arange(tokens, device=q.device)
    visible = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device)
    if causal:
        visible &= at[:, None] >= at[None, :]
    if window:
        visible &= at[:, None] - at[None, :] < window
    if chunk:
        visible &= at[:, None] // chunk == at[None, :] // chunk
    logits = logits.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        logits = torch.cat((logits, sinks.view(1, -1, 1, 1).expand(*logits.shape[:3], 1)), -1)
    return (logits.softmax(-1)[..., :tokens] @ v).transpose(1, 2)


def linear_attention(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor | None = None) -> Tensor:
    """Attention by a state of fixed size: q and k [B, T, HK, d], v [B, T, H, dv] -> [B, T, H, dv].

    S_t = exp(decay_t) S_(t-1) + k_t u_t^T and y_t = S_t^T q_t, with u_t = v_t (https://arxiv.org/abs/2006.16236), or with beta the
    delta rule u_t = beta_t (v_t - (exp(decay_t) S_(t-1))^T k_t) (https://arxiv.org/abs/2412.06464). S starts at zero; backends
    keep it instead of a cache of keys and values. Head h of v reads head h // (H // HK) of q and k.

    Args:
        decay: [B, T, H], or [B, T, H, d] for one a key channel; logarithms, at most zero.
        beta: [B, T, H].
    """
    if q.is_meta:
        return v.new_empty(v.shape)
    q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], 2) for x in (q, k))
    factor = decay.exp() if decay.dim() == 4 else decay.exp().unsqueeze(-1)  # [B, T, H, d or 1]
    state = v.new_zeros(v.shape[0], v.shape[2], k.shape[3], v.shape[3])  # [B, H, d, dv]
    result = torch.empty_like(v)
    for t in range(v.shape[1]):
        state = state * factor[:, t].unsqueeze(-1)
        update = v[:, t]
        if beta is not None:
            update = (update - torch.einsum("bhde,bhd->bhe", state, k[:, t])) * beta[:, t].unsqueeze(-1)
        state = state + k[:, t].unsqueeze(-1) * update.unsqueeze(-2)
        result[:, t] = torch.einsum("bhde,bhd->bhe", state, q[:, t])
    return result
