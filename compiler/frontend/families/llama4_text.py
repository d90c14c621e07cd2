"""Llama 4: the router's sigmoid scales the input of an expert, not its output, and all experts are computed at once.

Each of the K choices is one call of the experts with one expert a token: experts(x * score_k, ids_k, 1).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moec.compiler.frontend.trace import activation_of


def _moe(module: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    x = hidden_states.reshape(-1, module.hidden_dim)  # [N, D]
    logits = F.linear(x, module.router.weight)  # [N, E]
    best, ids = torch.topk(logits, module.top_k, dim=-1)  # [N, K]
    scores = torch.sigmoid(best)
    experts, found = module.experts, activation_of(module.experts)
    result = module.shared_expert(x)
    for k in range(module.top_k):
        one = slice(k, k + 1)
        result = result + torch.ops.moec.experts(
            x * scores[:, one], ids[:, one], torch.ones_like(scores[:, one]), experts.gate_up_proj, experts.down_proj,
            None, None, found.activation, True, found.limit, True, False,
        )  # fmt: skip
    return result, logits


METHODS = {"Llama4TextMoe.forward": _moe}
