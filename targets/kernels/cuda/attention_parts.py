"""What attention needs beside its main kernel: its cache, and writing new keys and values into it."""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from moec.targets.kernels.cuda.emit import Expr, Shared, argument, kernel, store, strided
from moec.targets.kernels.cuda.intrinsics import call, grid_launch, grid_wait
from moec.targets.kernels.specs import AttentionSpec

PAGE = 32
"""Tokens of a page of the cache."""

THREADS = 256

_LOAD4 = r"""
#ifndef MOEC_LOAD4
#define MOEC_LOAD4
__device__ __forceinline__ void moec_load4_float32(float* d, const void* p) {
  const float4 v = *(const float4*)p;
  d[0] = v.x; d[1] = v.y; d[2] = v.z; d[3] = v.w;
}
__device__ __forceinline__ void moec_load4_bfloat16(float* d, const void* p) {
  const uint2 v = *(const uint2*)p;
  d[0] = __uint_as_float(v.x << 16); d[1] = __uint_as_float(v.x & 0xffff0000u);
  d[2] = __uint_as_float(v.y << 16); d[3] = __uint_as_float(v.y & 0xffff0000u);
}
#endif
"""


def page_shapes(spec: AttentionSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of a page of K and of V."""
    return (spec.kv_heads, PAGE, spec.d), (spec.kv_heads, PAGE, spec.dv)


def load4(target: Expr, source: Expr, dtype: str) -> None:
    """Read four neighbours, float32 or bfloat16, as float32."""
    call(f"moec_load4_{dtype}", _LOAD4, target, source)


def to_cache(x: Expr, dtype: str) -> Expr:
    """A float32 as the cache has it: bfloat16 is rounded to the nearest, ties to even."""
    if dtype == "float32":
        return x
    bits = T.Bind(T.reinterpret("uint32", x))
    odd = T.bitwise_and(T.shift_right(bits, T.uint32(16)), T.uint32(1))
    return T.cast(T.shift_right(bits + T.uint32(0x7FFF) + odd, T.uint32(16)), "uint16")


def from_cache(x: Expr, dtype: str) -> Expr:
    """A number of the cache as float32."""
    return x if dtype == "float32" else T.reinterpret("float32", T.shift_left(T.cast(x, "uint32"), T.uint32(16)))


def append_func(spec: AttentionSpec, dtype: str) -> tirx.PrimFunc:
    """PrimFunc (k_pool, v_pool, k [T, HK*d], v [T, HK*dv], blocks [NB, 4], page_table [S, MP]): the pools change."""
    stored = {"float32": "float32", "bfloat16": "uint16"}[dtype]

    def arguments() -> Any:
        pages, tokens, blocks = T.int64(), T.int64(), T.int64()
        pools = [argument(name, (pages, *shape), stored) for name, shape in zip(("k_pool", "v_pool"), page_shapes(spec), strict=True)]
        news = [argument(name, (tokens, spec.kv_heads * size), "float32") for name, size in (("k", spec.d), ("v", spec.dv))]
        table = (T.int64(), T.int64())
        return blocks, pools, news, argument("blocks", (blocks, 4), "int32"), argument("page_table", table, "int32")

    def body(operands: Any, _: Shared, block: Expr, thread: Expr) -> None:
        pools, news, blocks, page_table = operands[1:]
        grid_launch()
        grid_wait()
        slot, first, position = (T.Bind(blocks[block, i]) for i in (0, 1, 3))
        for pool, new, size in zip(pools, news, (spec.d, spec.dv), strict=True):
            width = spec.kv_heads * size
            with strided(thread, blocks[block, 2] * width, THREADS) as i:
                token, rest = T.Bind(i // width), T.Bind(i % width)
                at = T.Bind(position + token)
                where = T.Bind(page_table[slot, at // PAGE])
                store(pool, to_cache(new[first + token, rest], dtype), where, rest // size, at % PAGE, rest % size)

    return kernel("append", THREADS, arguments, lambda o: [o[0]], body)
