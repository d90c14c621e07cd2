"""What the kernels of attention share: the cache, writing new keys and values into it, and which positions a token sees."""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from moec.runtime.tvm_pages import STORED
from moec.targets.kernels.cuda.emit import Buffer, Expr, Shared, argument, kernel, store, strided
from moec.targets.kernels.cuda.intrinsics import call, grid_launch, grid_wait
from moec.targets.kernels.specs import AttentionSpec

PAGE = 32
"""Tokens of a page of the cache."""

THREADS = 256

HIDDEN = -1e30  # the logit of a position that a token does not see
LOWEST = -5e29  # where a running maximum starts: exp(HIDDEN - LOWEST) is 0

_TANH = r"""
#ifndef MOEC_TANH
#define MOEC_TANH
__device__ __forceinline__ float moec_tanh(float x) { return tanhf(x); }
#endif
"""


def page_shapes(spec: AttentionSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of a page of K and of V."""
    return (spec.kv_heads, PAGE, spec.d), (spec.kv_heads, PAGE, spec.dv)


def first_seen(spec: AttentionSpec, position: Expr) -> Expr:
    """The first position that the token at a position sees."""
    start: Expr = T.int32(0)
    if spec.window:
        start = T.max(start, position - (spec.window - 1))
    if spec.chunk:
        start = T.max(start, position // spec.chunk * spec.chunk)
    return start


def joined(blocks: Buffer, together: int, base: Expr, count: Expr) -> Expr:
    """How many of the blocks of tokens from `base` on, of `count` in all, are attended for together.

    It is 1 unless all of `together`, or what there is of them, go on with one sequence.
    """
    found = T.Bind(T.min(T.int32(together), count - base))
    same: Any = T.bool(True)
    for i in range(1, together):
        one, before = T.Bind(T.min(base + i, count - 1)), T.Bind(T.min(base + i, count - 1) - 1)
        goes_on = T.And(blocks[one, 0] == blocks[base, 0], blocks[one, 3] == blocks[before, 3] + blocks[before, 2])
        same = T.And(same, T.Or(base + i >= count, goes_on))
    return T.Bind(T.Select(same, found, T.int32(1)))


def softcapped(logit: Expr, cap: float) -> Expr:
    """A logit within -cap to cap; 0: as it is."""
    return call("moec_tanh", _TANH, logit * T.float32(1 / cap), result="float32") * T.float32(cap) if cap else logit


def pool_arguments(spec: AttentionSpec, dtype: str) -> list[Buffer]:
    """The next two parameters: the pools of K and of V, with as many pages each."""
    pages, shapes = T.int64(), page_shapes(spec)
    return [argument(name, (pages, *shape), STORED[dtype]) for name, shape in zip(("k_pool", "v_pool"), shapes, strict=True)]


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

    def arguments() -> Any:
        tokens, blocks = T.int64(), T.int64()
        pools = pool_arguments(spec, dtype)
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
