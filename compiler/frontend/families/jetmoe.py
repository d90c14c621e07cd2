"""JetMoE: its experts sort tokens by expert with sizes known only while running, and attention heads are experts too.

The feed-forward experts are an ordinary `experts` op. The mixture of attention projects a token with K experts and back; written
here over all experts with a one-hot choice [N, K, E], so that no shape depends on the choice.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moec.compiler.frontend.trace import activation_of


def _route(router: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x [N, D] -> logits [N, E], ids and weights [N, K]."""
    logits = F.linear(x, router.layer.weight)
    best, ids = torch.topk(logits, router.top_k, dim=-1)
    return logits, ids, torch.softmax(best, -1)


def _moe(module: Any, layer_input: Tensor) -> Tensor:
    x = layer_input.reshape(-1, module.input_size)
    _, ids, weights = _route(module.router, x)
    found = activation_of(module)
    result = torch.ops.moec.experts(
        x, ids, weights, module.input_linear.weight, module.output_linear.weight,
        None, None, found.activation, True, found.limit, False, False,
    )  # fmt: skip
    return result.view(layer_input.shape) + module.bias  # type: ignore[no-any-return]


def _map(module: Any, layer_input: Tensor) -> tuple[Tensor, Tensor, Any]:
    """[B, T, D] -> queries [B, T, K, F] of the chosen experts."""
    batch, tokens, _ = layer_input.shape
    x = layer_input.reshape(-1, module.input_size)
    logits, ids, weights = _route(module.router, x)
    every = torch.matmul(x, module.input_linear.weight.flatten(0, 1).t())  # [N, E * F]
    every = every.view(-1, module.num_experts, module.hidden_size)
    chosen = every.gather(1, ids.unsqueeze(-1).expand(-1, -1, module.hidden_size))  # [N, K, F]
    return chosen.view(batch, tokens, module.top_k, module.hidden_size), logits, (ids, weights)


def _reduce(module: Any, layer_input: Tensor, topo_info: Any) -> Tensor:
    """[B, T, K, F] -> [B, T, D], each of the K parts by its own expert's output projection."""
    batch, tokens, _, hidden = layer_input.shape
    ids, weights = topo_info
    parts = layer_input.reshape(-1, module.top_k, hidden) * weights.unsqueeze(-1)  # [N, K, F]
    index = ids.unsqueeze(-1).expand(-1, -1, hidden)
    spread = parts.new_zeros(parts.shape[0], module.num_experts, hidden).scatter(1, index, parts)  # [N, E, F]
    back = module.output_linear.weight.transpose(1, 2).flatten(0, 1)  # [E * F, D]
    result: Tensor = torch.matmul(spread.flatten(1), back).view(batch, tokens, module.input_size) + module.bias
    return result


METHODS = {"JetMoeMoE.forward": _moe, "JetMoeMoA.map": _map, "JetMoeMoA.reduce": _reduce}
