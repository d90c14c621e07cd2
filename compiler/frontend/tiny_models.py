"""A tiny random model of every MoE family that transformers offers as a causal language model.

Families are discovered from transformers' registry. For each, the default configuration is shrunk by rules over field names, and
every parameter is randomised, so that no norm, bias, sink or correction is an identity.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from moec.compiler.errors import MoecError
from moec.runtime.errors import unknown

LAYERS = 4
"""Layers of a tiny model."""

_LAYERS = r"(num_hidden_layers|n_layers|num_layers|n_layer)"
"""Fields with their number."""

_SIZES: tuple[tuple[str, int], ...] = (
    (r"vocab_size|vocab_size_per_layer_input", 128),
    (r"(hidden_size|d_model|n_embd|embed_dim)", 64),
    (r"(num_attention_heads|n_heads|n_head|num_heads|swa_num_attention_heads|num_swa_attention_heads)", 4),
    (r"(num_key_value_heads|kv_n_heads|swa_num_key_value_heads|num_swa_key_value_heads|num_global_key_value_heads)", 2),
    (r"(head_dim|kv_channels|attention_head_dim|swa_head_dim|global_head_dim|v_head_dim|qk_nope_head_dim|swa_v_head_dim)", 16),
    (r"qk_rope_head_dim", 8),
    (r"qk_head_dim", 24),
    (r"q_lora_rank", 24),
    (r"(kv_lora_rank|o_lora_rank)", 16),
    (r".*(intermediate_size|ffn_hidden|ffn_hidden_size|ffn_dim|intermediate_size_mlp|intermediate_dim|moe_ffn_size)", 48),
    (r"(num_experts|num_local_experts|n_routed_experts|moe_num_experts|num_routed_experts)", 8),
    (r"(num_experts_per_tok|num_experts_per_token|moe_top_k|moe_topk|moe_k|top_k_experts|num_selected_experts)", 2),
    (r"n_group|num_expert_group", 4),
    (r"topk_group", 2),
    (r"(sliding_window|attention_chunk_size|sliding_window_size|window_size|swa_window_size|attn_window_size)", 8),
    (r"(max_position_embeddings|max_seq_len|n_positions|seq_length)", 128),
    (r"(first_k_dense_replace|num_dense_layers|moe_layer_start_index|first_k_dense|n_dense_layers)", 1),
    (r"(n_groups|mamba_n_groups)", 2),
    (r"(attn_layer_period|expert_layer_period)", 2), (r"attn_layer_offset", 0), (r"expert_layer_offset", 1),
    (r"(linear_num_value_heads|linear_num_key_heads|mamba_n_heads|mamba_num_heads|lin_num_heads)", 4),
    (r"(linear_key_head_dim|linear_value_head_dim|mamba_d_head|mamba_head_dim|mamba_d_state|ssm_state_size)", 16),
    (r"(index_head_dim|indexer_head_dim)", 16), (r"(index_n_heads|index_num_heads|indexer_n_heads)", 2), (r"indexer_kv_heads", 1),
    (r"block_size", 8), (r"(index_topk|indexer_budget)", 8), (r"index_block_size", 4), (r"(index_topk_blocks|indexer_compress_ratio)", 2),
    (r"(bos_token_id|eos_token_id|pad_token_id)", 0),
    (r"floor_scale", 8), (r"zero_expert_num", 4),
)  # fmt: skip
"""Field name -> value in a tiny configuration."""


_REQUIRED = (
    r"(n_routed_experts|num_experts|num_experts_per_tok|top_k_experts|moe_intermediate_size|n_group|topk_group|head_dim|moe_topk"
    r"|n_shared_experts|indexer_\w+)"
)
"""Fields that a model needs although their default is None."""

_SWITCHES = r"(enable_moe_block|is_moe|use_moe)"
"""Fields that say whether there are experts at all."""

_RELATIONS: tuple[tuple[str, Callable[[Mapping[str, Any]], int]], ...] = (
    ("num_key_value_heads", lambda c: c["num_attention_heads"]),
    ("head_dim", lambda c: c["qk_nope_head_dim"] + c["qk_rope_head_dim"]),
    ("mamba_d_head", lambda c: c["mamba_expand"] * c["hidden_size"] // c["mamba_n_heads"]),
)
"""Field -> what it is in terms of others; what holds of a default configuration must hold of its tiny one."""


def _tiny_value(name: str, value: Any) -> Any:
    if value is None and re.fullmatch(_REQUIRED, name):
        value = 2
    if re.fullmatch(_SWITCHES, name):
        return True
    if name == "clip_qkv":
        return 0.8
    if isinstance(value, int) and not isinstance(value, bool):
        if re.fullmatch(_LAYERS, name):
            return LAYERS
        for pattern, size in _SIZES:
            if re.fullmatch(pattern, name):
                return 1 if value == 1 and name in ("n_group", "topk_group") else size
    if isinstance(value, list) and value and re.search(r"token_id", name):
        return [0]
    return value


def _relate(tiny: dict[str, Any], default: Mapping[str, Any]) -> None:
    """Make the relations hold in `tiny` that hold in `default`."""
    for name, function in _RELATIONS:
        with contextlib.suppress(KeyError, TypeError):
            if default[name] == function(default):
                tiny[name] = function(tiny)


def _per_layer(default: Mapping[str, Any], tiny: Mapping[str, Any]) -> dict[int, Any]:
    """What single layers have otherwise, for the layers of a tiny configuration: as much larger or smaller than the rest as it was."""
    by_layer: dict[int, dict[str, Any]] = {int(layer): values for layer, values in default["per_layer_config"].items()}
    found: dict[int, Any] = {}
    for layer, kind in enumerate(tiny["layer_types"]):
        values = by_layer.get(default["layer_types"].index(kind))
        if values:
            small = {n: tiny[n] * v // default[n] if isinstance(v, int) and default[n] else v for n, v in values.items()}
            related = {**tiny, **small}
            _relate(related, {**default, **values})
            found[layer] = {n: v for n, v in related.items() if v != tiny[n] or n in small}
    return found


def _other_kinds(config: Any) -> list[str]:
    """Kinds of layers that a family's model knows and its default configuration does not have."""
    source = inspect.getsource(importlib.import_module(type(config).__module__.replace("configuration", "modeling")))
    kinds = dict.fromkeys(re.findall(r'(?<!mlp_)layer_types?(?:\[[\w.]+\])? == "(\w+)"', source))
    windows = getattr(config, "sliding_window", None)
    return [k for k in kinds if k not in config.layer_types and ("sliding" not in k or windows) and k not in ("sparse", "dense")]


_ALLOW = "allow_global_per_layer_attribute_access"
"""Without it transformers refuses to read what differs from layer to layer."""


def _layer_list(values: list[Any]) -> list[Any]:
    """The shortest cover of a per-layer pattern in LAYERS entries: what is in it, in order of appearance, then its end."""
    kinds = list(dict.fromkeys(map(str, values)))
    first = [next(v for v in values if str(v) == k) for k in kinds]
    return (first * LAYERS)[:LAYERS]


def tiny_config(config: Any, keep: tuple[str, ...] = ()) -> Any:
    """A tiny configuration of the same class.

    Args:
        config: the default configuration.
        keep: fields that keep their default.
    """
    if hasattr(config, _ALLOW):
        setattr(config, _ALLOW, True)  # what single layers have otherwise is handled below
    layers = next((getattr(config, n) for n in ("num_hidden_layers", "n_layers", "num_layers") if hasattr(config, n)), 0)
    ignored = ("transformers_version", "architectures", "dtype", "model_type", "per_layer_config", _ALLOW)
    default = config.to_dict()
    data = {k: v for k, v in default.items() if k not in ignored}
    tiny: dict[str, Any] = {}
    for name, value in data.items():
        part = getattr(config, name, None)
        if hasattr(part, "to_dict"):
            tiny[name] = tiny_config(part).to_dict()
        elif isinstance(value, list) and len(value) == layers and layers > 1:
            tiny[name] = _layer_list([*value, *_other_kinds(config)] if name == "layer_types" else value)
        else:
            tiny[name] = _tiny_value(name, value)
    if "kv_lora_rank" in data and "num_key_value_heads" in tiny:
        tiny["num_key_value_heads"] = tiny["num_attention_heads"]
    if "qk_rope_head_dim" in data and "head_dim" in data:  # latent attention: what is rotated
        tiny["head_dim"] = tiny["qk_rope_head_dim"]
    _relate(tiny, data)
    tiny |= {name: data[name] for name in keep}
    if "per_layer_config" in default:
        tiny["per_layer_config"] = _per_layer(default, tiny)
    return type(config).from_dict(tiny)


def families() -> dict[str, Any]:
    """Model type -> configuration class, of every causal language model whose configuration has fields for experts."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    found = {}
    for model_type in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        if model_type in CONFIG_MAPPING_NAMES and f"{model_type}_text" not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            cls = CONFIG_MAPPING[model_type]
            source = inspect.getsource(sys.modules[cls.__module__])
            if re.search(r"^\s+\w*(expert|moe)\w*\s*:", source, re.MULTILINE):
                found[model_type] = cls
    return found


def randomise(model: Any, seed: int = 0) -> None:
    """Give every parameter and saved buffer random values of a sensible size."""
    generator = torch.Generator().manual_seed(seed)
    saved = set(model.state_dict())
    table = None if getattr(model.config.get_text_config(), "tie_word_embeddings", False) else model.get_input_embeddings().weight
    with torch.no_grad():
        tensors: list[tuple[str, Tensor]] = [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if n in saved)]
        for name, tensor in tensors:
            if not tensor.is_floating_point() or re.search(r"slope|decay", name):  # computed from the configuration, not learned
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor is table:  # rows are looked up, not summed
                tensor.copy_(noise)
            elif tensor.dim() == 3 and tensor.shape[1] == 1:  # a convolution of each channel
                tensor.copy_(noise * tensor.shape[-1] ** -0.5)
            elif tensor.dim() >= 2:
                tensor.copy_(noise * min(tensor.shape[-1], tensor.shape[-2]) ** -0.5)
            elif name.endswith("bias") or "sink" in name:
                tensor.copy_(noise * 0.2)
            elif name.endswith("A_log"):  # decay rates; fast decay makes transformers' own chunked float32 form inexact
                tensor.copy_(noise * 0.3 - 3)
            else:
                tensor.copy_(1 + noise * 0.3)


def tiny_model(name: str) -> tuple[Any, Any]:
    """(configuration, model with random weights) of a family, in float32 on the CPU.

    Raises:
        MoecError: no family has that name, or no tiny model of it can be made.
    """
    known = families()
    if name not in known:
        raise unknown("model family", name, known)
    torch.manual_seed(0)
    try:
        config, model = _first_valid(known[name]())
    except Exception as error:
        raise MoecError(f"{name}: no tiny model: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from error
    model.set_experts_implementation("eager")
    randomise(model)
    return config, model


def _first_valid(default: Any) -> tuple[Any, Any]:
    """A tiny configuration and its model; what the family's own checks reject keeps its default, where that is small."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    small = (n for n, v in default.to_dict().items() if isinstance(v, int) and v <= _SMALL and _tiny_value(n, v) != v)
    first: Exception | None = None
    for keep in ((), *((name,) for name in small)):
        try:
            config = tiny_config(default, keep)
            cls: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
            return config, _build(cls, config)
        except Exception as error:  # noqa: BLE001  # checks raise whatever their authors chose
            first = first or error
    assert first is not None
    raise first


_SMALL = 16
"""The largest default that a tiny model may keep."""

_MISSING = {"rope_theta": 10000.0, "pad_token_id": None}
"""What some configurations lack although their models read it."""


def _build(cls: Any, config: Any) -> Any:
    """The model; a configuration that lacks something gets it and is tried again."""
    for _ in range(4):
        try:
            return cls._from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
        except AttributeError as error:
            if error.name not in _MISSING:
                raise
            for part in (config, *(v for v in vars(config).values() if hasattr(v, "to_dict"))):
                if not hasattr(part, error.name):
                    setattr(part, error.name, _MISSING[error.name])
        except TypeError:
            if getattr(config, "layer_types", ()) is not None:
                raise
            source = inspect.getsource(sys.modules[cls.__module__])
            kinds = [k for k in ("conv", "linear_attention", "sliding_attention", "full_attention") if f'"{k}"' in source]
            config.layer_types = (kinds * LAYERS)[:LAYERS]
    raise MoecError("the configuration lacks too much")
