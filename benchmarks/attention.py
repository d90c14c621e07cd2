"""What attention costs a layer and step on this processor: our kernel against TVM's PagedKVCache.

    python -m benchmarks.attention

Both run float32 on one thread, decoding one token with a context of N tokens in the cache; the minimum of many calls is shown, so that
other load matters little. PagedKVCache has one layer here, so that what has to be called around every step counts in full.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from typing import Any

os.environ["TVM_NUM_THREADS"] = "1"

import numpy as np
import tvm
import tvm_ffi
from tvm import relax
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn.llm.kv_cache import PagedKVCache, RopeMode, TIRPagedKVCache
from tvm.runtime import ShapeTuple
from tvm.target import Target

from moec.runtime.tvm_arrays import aligned
from moec.targets import get_target
from moec.targets.kernels.cpu.attention import PAGE, attention_func, page_shapes
from moec.targets.kernels.cpu.isa import Isa
from moec.targets.kernels.specs import AttentionSpec

TARGET = Target(json.loads(get_target("cpu").tvm))
HEADS, KV_HEADS, SIZE = 4, 2, 64
CONTEXTS = (32, 150, 512, 2048)
CALLS = 300


def best(call: Callable[[], object]) -> float:
    """Microseconds of the fastest of many calls."""
    times = []
    for _ in range(CALLS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times) * 1e6


def tensor(array: np.ndarray) -> Any:
    copy = aligned(array.shape, array.dtype)
    copy[...] = array
    return tvm_ffi.from_dlpack(copy)


def ours(context: int) -> float:
    """Our kernel, with the tokens of the context in pages of a random order."""
    spec = AttentionSpec(HEADS, KV_HEADS, SIZE, SIZE, SIZE**-0.5)
    func = attention_func(spec, 1, Isa.of(TARGET)).with_attr("global_symbol", "kernel")
    kernel = tvm.compile(func, TARGET)["kernel"]
    rng, pages = np.random.default_rng(0), -(-context // PAGE) + 1
    pools = [tensor(rng.standard_normal((pages, *shape)).astype(np.float32)) for shape in page_shapes(spec)]
    tensors = [tensor(np.ones((1, heads * SIZE), np.float32)) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    blocks = tensor(np.array([[0, 0, 1, context]], np.int32))
    table = tensor(rng.permutation(pages).astype(np.int32)[None])
    return best(lambda: kernel(*pools, *tensors[:3], blocks, table, tensors[3]))


class _Attention(nn.Module):
    def forward(self, qkv: nn.Tensor, cache: PagedKVCache) -> tuple[nn.Tensor, PagedKVCache]:
        return cache.attention_with_fused_qkv(0, qkv, HEADS, SIZE**-0.5), cache

    def create(self, batch: Any, total: Any, chunk: Any, page: Any, sliding: Any) -> PagedKVCache:
        return TIRPagedKVCache(
            attn_kind="mha",
            max_batch_size=batch,
            max_total_seq_len=total,
            prefill_chunk_size=chunk,
            page_size=page,
            support_sliding_window=sliding,
            layer_partition=relax.ShapeExpr([0, 1]),
            num_hidden_layers=1,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            qk_head_dim=SIZE,
            v_head_dim=SIZE,
            mla_original_qk_head_dim=0,
            mla_original_v_head_dim=0,
            rope_mode=RopeMode.NONE,
            rope_scale=1,
            rope_theta=10000,
            rope_scaling={},
            rope_ext_factors=relax.prim_value(0),
            rotary_dim=SIZE,
            enable_disaggregation=False,
            dtype="float32",
            target=TARGET,
        )


def theirs(contexts: tuple[int, ...]) -> dict[int, float]:
    """TVM's cache with its own kernels; a step includes what has to be called around it."""
    width, modes = HEADS + 2 * KV_HEADS, {"param_mode": "none", "effect_mode": "none"}
    spec = {
        "forward": {
            "qkv": nn.spec.Tensor([1, "s", width, SIZE], "float32"),
            "cache": nn.spec.Object(object_type=PagedKVCache),
            "$": modes,
        },
        "create": {
            **dict.fromkeys(("batch", "total", "chunk", "page", "sliding"), int),
            "$": modes,
        },
    }
    module, _ = _Attention().export_tvm(spec=spec)
    machine = relax.VirtualMachine(tvm.compile(module, TARGET), tvm.cpu())
    cache = machine["create"](*(ShapeTuple([n]) for n in (1, 4096, 4096, 16, 0)))
    begin, end, add = (tvm.get_global_func(f"vm.builtin.kv_state_{n}") for n in ("begin_forward", "end_forward", "add_sequence"))
    pop = tvm.get_global_func("vm.builtin.kv_state_popn")
    add(cache, 0)

    def step(tokens: int, qkv: Any) -> None:
        begin(cache, ShapeTuple([0]), ShapeTuple([tokens]))
        machine["forward"](qkv, cache)
        end(cache)

    found, length, one = {}, 0, tensor(np.ones((1, 1, width, SIZE), np.float32))
    for context in contexts:
        step(context - length, tensor(np.ones((1, context - length, width, SIZE), np.float32)))
        length = context

        def decode() -> None:
            step(1, one)
            pop(cache, 0, 1)

        found[context] = best(decode)
    return found


def main() -> None:
    """Print a table."""
    other = theirs(CONTEXTS)
    print(f"decode, {HEADS} heads, {KV_HEADS} key/value heads of {SIZE}, float32, one thread: microseconds a layer and step\n")
    print("| context | moec | PagedKVCache |\n|---|---|---|")
    for context in CONTEXTS:
        print(f"| {context} | {ours(context):.1f} | {other[context]:.1f} |")


if __name__ == "__main__":
    main()
