"""Facts about a model that no node of its graph states, read from its configuration without naming model families."""

from __future__ import annotations

from typing import Any

from moec.compiler.ir import Attr

_NAMES: dict[str, tuple[str, ...]] = {
    "context_length": ("max_position_embeddings", "max_seq_len", "n_positions"),
    "vocab_size": ("vocab_size",),
    "hidden_size": ("hidden_size", "d_model", "n_embd"),
    "layers": ("num_hidden_layers", "n_layers", "num_layers", "n_layer"),
    "heads": ("num_attention_heads", "n_heads", "n_head"),
    "kv_heads": ("num_key_value_heads", "kv_n_heads", "num_kv_heads"),
    "head_size": ("head_dim", "kv_channels"),
    "experts": ("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts", "num_routed_experts"),
    "top_k": ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "moe_k", "top_k_experts", "num_selected_experts"),
    "sliding_window": ("sliding_window",),
    "attention_chunk": ("attention_chunk_size",),
    "bos_token_id": ("bos_token_id",),
    "eos_token_id": ("eos_token_id",),
    "pad_token_id": ("pad_token_id",),
}  # fmt: skip


def _plain(value: Any) -> Attr:
    return tuple(map(_plain, value)) if isinstance(value, (list, tuple)) else value


def _get(config: Any, name: str) -> Any:
    """An attribute of a configuration, or None where it has none, or one for each layer (which transformers refuses to read)."""
    try:
        return getattr(config, name, None)
    except RuntimeError:
        return None


def _find(configs: list[Any], names: tuple[str, ...]) -> Any:
    """The first of these attributes that a configuration, or a part of one, has."""
    for config in configs:
        for name in names:
            value = _get(config, name)
            if isinstance(value, (int, float, str)) and not isinstance(value, bool):
                return value
            if isinstance(value, (list, tuple)) and value and all(isinstance(v, int) for v in value):
                return value
    return None


def facts(model: Any) -> dict[str, Attr]:
    """What a graph's `meta` says about a causal language model."""
    config = model.config
    text = config.get_text_config()
    parts = [v for v in vars(text).values() if hasattr(v, "to_dict")]
    found: dict[str, Attr] = {"model_type": str(config.model_type), "architecture": type(model).__name__}
    for fact, names in _NAMES.items():
        value = _find([text, config, *parts], names)
        if value is not None:
            found[fact] = _plain(value)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    found["tied_embeddings"] = head is not None and embedding is not None and head.weight is embedding.weight
    return found
