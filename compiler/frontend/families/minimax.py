"""MiniMax: lightning attention is a loop over blocks of tokens inside a method; it is linear attention with a fixed decay a head.

https://arxiv.org/abs/2401.04658
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _lightning(module: Any, hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, None]:
    """[B, T, D] -> [B, T, D]."""
    batch, tokens = hidden_states.shape[:2]
    heads = (batch, tokens, module.num_attention_heads, 3 * module.head_dim)
    q, k, v = module.act_fn(module.qkv_proj(hidden_states)).reshape(heads).chunk(3, -1)
    decay = (-module.slope_rate).view(1, 1, -1).expand(batch, tokens, -1)
    mixed = torch.ops.moec.linear_attention(q, k, v, decay, None).reshape(batch, tokens, -1)
    return module.out_proj(torch.sigmoid(module.output_gate(hidden_states)) * module.norm(mixed)), None


METHODS = {"MiniMaxLightningAttention.forward": _lightning}
