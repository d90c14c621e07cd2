"""From a torch module on the meta device to an exported ATen program that already speaks MoE.

Transformers' own extension points carry the meaning across: an experts implementation and an attention implementation of ours
are registered under the name `moec` and emit the custom operators `moec::experts` and `moec::attention`. No model family is named.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("moec::experts", mutates_args=())
def experts_op(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    gated: bool,
    limit: float,
    transposed: bool,
    interleaved: bool,
) -> Tensor:
    """The traced form of `moec.compiler.ops.experts`: weights as the module keeps them."""
    raise NotImplementedError("moec::experts exists to be traced")


@experts_op.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("moec::attention", mutates_args=())
def attention_op(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scale: float, causal: bool, window: int, chunk: int, softcap: float
) -> Tensor:
    """The traced form of `moec.compiler.ops.attention`: q, k, v are [B, H, T, d], the result is [B, T, H, dv]."""
    raise NotImplementedError("moec::attention exists to be traced")


@attention_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


def _experts(module: Any, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    gated = getattr(module, "has_gate", True)
    up = module.gate_up_proj if gated else module.up_proj
    biases = (None, None)
    if getattr(module, "has_bias", False):
        biases = (module.gate_up_proj_bias if gated else module.up_proj_bias, module.down_proj_bias)
    return torch.ops.moec.experts(
        hidden, ids, weights, up, module.down_proj, *biases, "silu", gated, 0.0,
        bool(module.is_transposed), not module.is_concatenated,
    )


def _attention(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float | None = None, **kwargs: Any) -> Any:
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    sinks = kwargs.get("s_aux")
    out = torch.ops.moec.attention(
        q, k, v, sinks, scale, True, kwargs.get("sliding_window") or 0, 0, kwargs.get("softcap") or 0.0
    )
    return out, None


def register() -> None:
    """Make `moec` known to transformers as an experts, attention and mask implementation."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS._global_mapping["moec"] = _experts
    ALL_ATTENTION_FUNCTIONS.register("moec", _attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register("moec", lambda *_args, **_kwargs: None)


class _Logits(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=ids, position_ids=positions, use_cache=False).logits
        return logits


def export_language_model(model: Any) -> torch.export.ExportedProgram:
    """Export a causal language model as a program from ids and positions [B, T] to logits [B, T, V]."""
    register()
    model.set_experts_implementation("moec")
    model.set_attn_implementation("moec")
    example = torch.zeros(3, 7, dtype=torch.long, device="meta")
    shape = {0: torch.export.Dim("B", min=1, max=1 << 20), 1: torch.export.Dim("T", min=2, max=1 << 30)}
    program = torch.export.export(
        _Logits(model), (example, example.clone()), dynamic_shapes=(shape, shape), strict=False
    )
    return program.run_decompositions({})
