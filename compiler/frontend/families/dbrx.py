"""DBRX: experts' projections are rows of flat matrices [E * F, D], gate and up apart, down transposed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moec.compiler.frontend.trace import activation_of


def _experts(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    mlp, found = module.mlp, activation_of(module.mlp)
    shape = (module.num_experts, module.ffn_hidden_size, module.hidden_size)
    up = torch.cat((mlp.w1.view(shape), mlp.v1.view(shape)), 1)  # [E, 2F, D]
    down = mlp.w2.view(shape).transpose(1, 2)  # [E, D, F]
    flat = hidden_states.reshape(-1, module.hidden_size)
    result = torch.ops.moec.experts(
        flat, top_k_index, top_k_weights, up, down, None, None, found.activation, True, found.limit, False, False
    )
    return result.view(hidden_states.shape)  # type: ignore[no-any-return]


METHODS = {"DbrxExperts.forward": _experts}
