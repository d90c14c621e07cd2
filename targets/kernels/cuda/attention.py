"""Attention over a paged cache of keys and values: append the new tokens, then attend.

The cache of a layer is two arrays of pages of `PAGE` tokens, K [pages, HK, PAGE, d] and V [pages, HK, PAGE, dv], float32 or bfloat16 (as
its bits). Tokens come as blocks, as in the CPU kernel: `blocks` holds (row of the page table, first token, number of tokens, first
position) of each.

Few tokens take one kernel, `step`, which does what comes before with q and k too; somewhat more, where some blocks may have several, take
another one for these (`attend_product`). Many take one that appends and, where head sizes are multiples of what the tensor cores take, one
for blocks of many tokens and one for those of a single one; else `attend`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tvm import relax, tirx

from moec.targets.kernels.cuda.attend import attend_func
from moec.targets.kernels.cuda.attend_product import AttendProduct, attend_product_func
from moec.targets.kernels.cuda.attention_parts import PAGE, STORED, append_func, page_shapes
from moec.targets.kernels.cuda.step import outputs, step_func
from moec.targets.kernels.cuda.step_spec import StepOptions, StepSpec
from moec.targets.kernels.specs import AttentionSpec

Get = Callable[[str, object, Callable[[], tirx.PrimFunc]], relax.GlobalVar]

__all__ = ["PAGE", "STORED", "attention", "attention_step", "page_shapes", "takes_step"]

MOST_STEP = 256
"""Tokens of a call of any number: for those of long prompts, `step` would normalise rows too often."""


def takes_step(spec: AttentionSpec, tokens: int | None, most: int | None, dtype: str, memory: int) -> bool:
    """Whether `attention_step` serves a function of so many tokens, or of any number up to `most`."""
    return tokens is not None or (most is not None and most <= MOST_STEP and AttendProduct.fits(spec, dtype, memory))


def attention(
    bb: relax.BlockBuilder, get: Get, caches: Sequence[relax.Expr], inputs: Sequence[relax.Expr], spec: AttentionSpec, memory: int,
    dtype: str = "float32",
) -> relax.Var:  # fmt: skip
    """Emit attention of any number of tokens: caches (k_pool, v_pool), inputs (q, k, v, blocks, page_table[, sinks]) -> float32 [T, H*dv].

    Kernels come from `get` by their name and what tells them apart. Thread blocks may take `memory` bytes of shared memory. The caches
    change in place.
    """
    q, k, v, blocks, table, *sinks = inputs
    count, kinds = q.ty.shape[0], [cache.ty for cache in caches]
    append = get("append", (spec, dtype), lambda: append_func(spec, dtype))
    found = bb.emit(relax.op.call_tir_inplace(append, relax.Tuple([*caches, k, v, blocks, table]), [0, 1], kinds))
    pools = [bb.emit(relax.TupleGetItem(found, i)) for i in (0, 1)]
    out = relax.TensorType((count, spec.heads * spec.dv), "float32")
    args = [*pools, q, blocks, table, *sinks]
    if not AttendProduct.fits(spec, dtype, memory):
        return bb.emit(relax.call_tir(get("attend", (spec, dtype), lambda: attend_func(spec, dtype)), args, out_ty=out))
    many = get("attend_many", (spec, dtype), lambda: attend_product_func(spec, dtype, many=True))
    single = get("attend_single", (spec, dtype), lambda: attend_product_func(spec, dtype, many=False))
    found = bb.emit(relax.call_tir(many, args, out_ty=out))
    return bb.emit(relax.op.call_tir_inplace(single, relax.Tuple([*args, found]), [len(args)], [out]))


def attention_step(
    bb: relax.BlockBuilder, get: Get, caches: Sequence[relax.Expr], inputs: Sequence[relax.Expr], spec: StepSpec, options: StepOptions,
    dtype: str = "float32",
) -> relax.Var:  # fmt: skip
    """Emit attention of few tokens, with norms and rope: caches (k_pool, v_pool), other inputs of `Step` -> float32 [T, H*dv].

    The caches change in place.
    """
    shapes = outputs(spec, options, inputs[0].ty.shape[0])
    outs = [relax.TensorType(shape, "float32") for shape in shapes]
    step = get("attend_step", (spec, options, dtype), lambda: step_func(spec, options, dtype))
    kinds = [*(cache.ty for cache in caches), *outs]
    found = bb.emit(relax.op.call_tir_inplace(step, relax.Tuple([*caches, *inputs]), [0, 1, *[-1] * len(outs)], kinds))
    k_pool, v_pool, _, _, out, *ready = (bb.emit(relax.TupleGetItem(found, i)) for i in range(len(kinds)))
    if not ready:
        return out
    a = spec.attention
    many = get("attend_many", (a, dtype), lambda: attend_product_func(a, dtype, many=True))
    args = [k_pool, v_pool, *ready, inputs[3], inputs[4], *(inputs[-1:] if a.sinks else []), out]
    return bb.emit(relax.op.call_tir_inplace(many, relax.Tuple(args), [len(args) - 1], [outs[2]]))
