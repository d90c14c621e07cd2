"""Checkpoint folder of OLMoE's architecture -> GGUF, one tensor in memory at a time. Runs under llama.cpp's own Python.

    PEER_PYTHON -P benchmarks/llama_cpp/write_gguf.py CHECKPOINT OUT.gguf --type q4_0

Which llama.cpp graph computes the same function as the checkpoint (see `src/models/` there):

    norm_topk_prob false, no grouped queries   olmoe        as llama.cpp's own converter does
    norm_topk_prob true                        minimax-m2   same maths: norms over whole q and k, softmax router whose
                                                            top-k is renormalised, a selection bias that is zero here
    norm_topk_prob false, grouped queries      none         (the olmoe graph wants a k_norm as wide as the hidden size)

Every matrix takes --type, except the router, which stays float32 as in llama.cpp's own files. Files hold no tokenizer:
the measurement feeds token ids.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf  # type: ignore[import-not-found]  # lives in the environment of llama.cpp
import numpy as np
from gguf.utility import LocalTensor, SafetensorsLocal  # type: ignore[import-not-found]

TYPES = {name.lower(): gguf.GGMLQuantizationType[name] for name in ("Q4_0", "Q8_0", "F16", "F32")}
FLOAT32 = gguf.GGMLQuantizationType.F32


class UnsupportedError(Exception):
    """llama.cpp has no graph for this checkpoint; the message says why."""


@dataclass(frozen=True)
class Entry:
    """One GGUF tensor, stacked from one or more checkpoint tensors; no source means zeros of `shape`."""

    name: str
    sources: tuple[str, ...]
    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]


def choose_graph(config: dict[str, Any]) -> str:
    if config["model_type"] != "olmoe":
        raise UnsupportedError(f"this writer knows model_type olmoe, config.json says {config['model_type']}")
    if config.get("clip_qkv"):
        raise UnsupportedError(f"llama.cpp's graphs do not clip q, k and v; config.json says clip_qkv {config['clip_qkv']}")
    if config["norm_topk_prob"]:
        return "minimax-m2"
    if config["num_key_value_heads"] != config["num_attention_heads"]:
        raise UnsupportedError("llama.cpp's olmoe graph has no grouped queries (its k_norm is as wide as the hidden size)")
    return "olmoe"


def read_index(folder: Path) -> dict[str, LocalTensor]:
    """Names, shapes and places of all tensors of the folder."""
    return {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in SafetensorsLocal(file).tensors.items()}


def load(tensor: LocalTensor) -> np.ndarray:
    """A checkpoint tensor as float32."""
    raw: np.ndarray = tensor.mmap_bytes()
    if tensor.dtype == "BF16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(tensor.shape)
    floats: np.ndarray = raw.view({"F32": np.float32, "F16": np.float16}[tensor.dtype])
    return floats.astype(np.float32).reshape(tensor.shape)


def entries(config: dict[str, Any], graph: str, kind: gguf.GGMLQuantizationType, index: dict[str, LocalTensor]) -> Iterator[Entry]:
    """All tensors of the file, in file order."""

    def entry(name: str, *sources: str, router: bool = False) -> Entry:
        shape = index[sources[0]].shape
        stacked = (len(sources), *shape) if "_exps" in name else shape
        return Entry(name, sources, FLOAT32 if len(shape) == 1 or router else kind, stacked)

    embedding = "model.embed_tokens.weight"
    yield entry("token_embd.weight", embedding)
    yield entry("output_norm.weight", "model.norm.weight")
    yield entry("output.weight", "lm_head.weight" if "lm_head.weight" in index else embedding)
    for layer in range(config["num_hidden_layers"]):
        ours, theirs = f"model.layers.{layer}", f"blk.{layer}"
        yield entry(f"{theirs}.attn_norm.weight", f"{ours}.input_layernorm.weight")
        yield entry(f"{theirs}.ffn_norm.weight", f"{ours}.post_attention_layernorm.weight")
        for projection in "qkv":
            yield entry(f"{theirs}.attn_{projection}.weight", f"{ours}.self_attn.{projection}_proj.weight")
        yield entry(f"{theirs}.attn_output.weight", f"{ours}.self_attn.o_proj.weight")
        yield entry(f"{theirs}.attn_q_norm.weight", f"{ours}.self_attn.q_norm.weight")
        yield entry(f"{theirs}.attn_k_norm.weight", f"{ours}.self_attn.k_norm.weight")
        yield entry(f"{theirs}.ffn_gate_inp.weight", f"{ours}.mlp.gate.weight", router=True)
        for part in ("gate", "up", "down"):
            experts = [f"{ours}.mlp.experts.{e}.{part}_proj.weight" for e in range(config["num_experts"])]
            yield entry(f"{theirs}.ffn_{part}_exps.weight", *experts)
        if graph == "minimax-m2":
            yield Entry(f"{theirs}.exp_probs_b.bias", (), FLOAT32, (config["num_experts"],))


def payload(entry: Entry, index: dict[str, LocalTensor]) -> np.ndarray:
    """The bytes of one entry; experts are encoded one by one."""
    if not entry.sources:
        return np.zeros(entry.shape, np.float32)
    parts = [gguf.quants.quantize(load(index[source]), entry.kind) for source in entry.sources]
    return np.stack(parts) if len(parts) > 1 else parts[0]


def write_metadata(writer: gguf.GGUFWriter, config: dict[str, Any], graph: str) -> None:
    head = config["hidden_size"] // config["num_attention_heads"]
    rope = config.get("rope_parameters") or config
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    if graph == "minimax-m2":
        writer.add_expert_feed_forward_length(config["intermediate_size"])
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SOFTMAX)


def write_gguf(checkpoint: Path, out: Path, type_name: str) -> str:
    """Write the file beside its place, then rename; returns the graph it uses."""
    config = json.loads((checkpoint / "config.json").read_text())
    graph, index = choose_graph(config), read_index(checkpoint)
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    writer = gguf.GGUFWriter(partial, graph)
    write_metadata(writer, config, graph)
    plan = list(entries(config, graph, TYPES[type_name], index))
    for entry in plan:
        stored = gguf.quant_shape_to_byte_shape(entry.shape, entry.kind)
        quantised = entry.kind not in (FLOAT32, gguf.GGMLQuantizationType.F16)
        dtype = np.dtype(np.uint8 if quantised else np.float32 if entry.kind is FLOAT32 else np.float16)
        writer.add_tensor_info(entry.name, stored if quantised else entry.shape, dtype, int(np.prod(stored)), raw_dtype=entry.kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for number, entry in enumerate(plan, start=1):
            writer.write_tensor_data(payload(entry, index))
            print(f"[{number}/{len(plan)}] {entry.name}", file=sys.stderr)
        writer.close()
        partial.rename(out)
    finally:
        partial.unlink(missing_ok=True)
    return graph


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--type", choices=sorted(TYPES), default="q4_0")
    options = parser.parse_args()
    try:
        graph = write_gguf(options.checkpoint, options.out, options.type)
    except UnsupportedError as reason:
        print(f"{options.checkpoint}: {reason}", file=sys.stderr)
        return 2
    print(f"{options.out}: graph {graph}, {options.type}, {options.out.stat().st_size / 2**30:.2f} GiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
