"""LongCat-Flash: some experts compute nothing and hand a token on as it is; a router chooses among those and the others.

https://arxiv.org/abs/2509.01322
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moec.compiler.frontend.trace import activation_of


def _experts(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """hidden_states [N, D], top_k_index and top_k_weights [N, K] -> [N, D]; experts from `num_routed_experts` on are identities."""
    found = activation_of(module)
    computes = top_k_index < module.num_routed_experts
    zero = torch.zeros((), dtype=top_k_weights.dtype, device=top_k_weights.device)
    result = torch.ops.moec.experts(
        hidden_states, torch.where(computes, top_k_index, 0), torch.where(computes, top_k_weights, zero),
        module.gate_up_proj[: module.num_routed_experts], module.down_proj, None, None, found.activation, True, found.limit, False, False,
    )  # fmt: skip
    handed_on = torch.where(computes, zero, top_k_weights).sum(-1, keepdim=True)  # [N, 1]
    return result + hidden_states * handed_on  # type: ignore[no-any-return]


METHODS = {"LongcatFlashExperts.forward": _experts}
