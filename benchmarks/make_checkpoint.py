"""Write a random-weight checkpoint of a published Mixture-of-Experts shape, for speed measurements without a download.

    python -m benchmarks.make_checkpoint OUT --shape olmoe-1b-7b [--layers N] [--seed N]

The folder looks like one from the hub: config.json, bfloat16 safetensors with one tensor per expert, one file a layer
and an index, a tokenizer. At most one layer is in memory. OUT appears complete or not at all.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from safetensors.torch import save_file

TINY_MODEL = Path(__file__).parents[1] / "examples" / "models" / "tiny-moe"
WEIGHT_STD = 0.02  # the published initializer_range of these models; logits stay finite

Config = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]

# https://huggingface.co/allenai/OLMoE-1B-7B-0924/blob/main/config.json
OLMOE_1B_7B: Config = {
    "architectures": ["OlmoeForCausalLM"],
    "model_type": "olmoe",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "clip_qkv": None,
    "eos_token_id": 50279,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": WEIGHT_STD,
    "intermediate_size": 1024,
    "max_position_embeddings": 4096,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 16,
    "num_key_value_heads": 16,
    "pad_token_id": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "router_aux_loss_coef": 0.01,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 50304,
}

# https://huggingface.co/Qwen/Qwen3-30B-A3B/blob/main/config.json
QWEN3_30B_A3B: Config = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": WEIGHT_STD,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 151936,
}

SHAPES: dict[str, Config] = {"olmoe-1b-7b": OLMOE_1B_7B, "qwen3-30b-a3b": QWEN3_30B_A3B}


def layer_shapes(config: Config, layer: int) -> Shapes:
    """Names and shapes of one decoder layer, as hub checkpoints have them."""
    hidden, experts = config["hidden_size"], config["num_experts"]
    width = int(config.get("moe_intermediate_size") or config["intermediate_size"])
    head = int(config.get("head_dim") or hidden // config["num_attention_heads"])
    queries, keys = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    per_head_norm = config["model_type"] == "qwen3_moe"  # OLMoE normalises the whole projection
    shapes: Shapes = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "self_attn.q_norm.weight": (head if per_head_norm else queries,),
        "self_attn.k_norm.weight": (head if per_head_norm else keys,),
        "mlp.gate.weight": (experts, hidden),
    }
    for expert in range(experts):
        shapes[f"mlp.experts.{expert}.gate_proj.weight"] = (width, hidden)
        shapes[f"mlp.experts.{expert}.up_proj.weight"] = (width, hidden)
        shapes[f"mlp.experts.{expert}.down_proj.weight"] = (hidden, width)
    return {f"model.layers.{layer}.{name}": shape for name, shape in shapes.items()}


def shards(config: Config) -> Iterator[Shapes]:
    """One entry a file: every decoder layer, then what stands outside of them."""
    for layer in range(config["num_hidden_layers"]):
        yield layer_shapes(config, layer)
    vocabulary = (config["vocab_size"], config["hidden_size"])
    yield {
        "model.embed_tokens.weight": vocabulary,
        "model.norm.weight": (config["hidden_size"],),
        "lm_head.weight": vocabulary,
    }


def random_tensor(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Ones for norms, normal values with standard deviation 0.02 for everything else."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0.0, WEIGHT_STD, generator=generator)


def write_checkpoint(out: Path, config: Config, seed: int) -> int:
    """Fill the existing folder `out`; returns the bytes of all weights."""
    generator = torch.Generator().manual_seed(seed)
    total = config["num_hidden_layers"] + 1
    console = Console(stderr=True)
    weight_map: dict[str, str] = {}
    nbytes = 0
    steps = track(shards(config), "writing", total, console=console, disable=not console.is_terminal)
    for number, shapes in enumerate(steps, start=1):
        file = f"model-{number:05d}-of-{total:05d}.safetensors"
        tensors = {name: random_tensor(shape, generator) for name, shape in shapes.items()}
        save_file(tensors, out / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        nbytes += sum(tensor.nbytes for tensor in tensors.values())
        if not console.is_terminal:
            console.print(f"wrote {file} ({nbytes / 2**30:.2f} GiB so far)")
    index = {"metadata": {"total_size": nbytes}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for file in ("tokenizer.json", "tokenizer_config.json"):  # a smaller vocabulary than the model's: enough for timing
        shutil.copy(TINY_MODEL / file, out / file)
    return nbytes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to create")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="olmoe-1b-7b")
    parser.add_argument("--layers", type=int, help="keep only this many decoder layers")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"{options.out} exists already; remove it or choose another folder")
    if options.layers is not None and options.layers < 1:
        parser.error(f"--layers must be at least 1, got {options.layers}")
    config = dict(SHAPES[options.shape])
    config["num_hidden_layers"] = options.layers or config["num_hidden_layers"]
    partial = options.out.with_name(f".{options.out.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        nbytes = write_checkpoint(partial, config, options.seed)
        partial.rename(options.out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    print(f"{options.out}: {options.shape}, {config['num_hidden_layers']} layers, {nbytes / 2**30:.2f} GiB of weights")
    return 0


if __name__ == "__main__":
    sys.exit(main())
