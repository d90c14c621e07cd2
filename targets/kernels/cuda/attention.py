"""Attention over a paged cache of keys and values: append the new tokens, then attend.

The cache of a layer is two arrays of pages of `PAGE` tokens, K [pages, HK, PAGE, d] and V [pages, HK, PAGE, dv], float32 or bfloat16 (as
its bits). Tokens come as blocks, as in the CPU kernel: `blocks` holds (row of the page table, first token, number of tokens, first
position) of each.

Tokens take one kernel, `step`, which does what comes before with q and k too; where some blocks may have several tokens, another one
attends for these, `attend_product`. Where head sizes are no multiples of what the tensor cores take, any number of tokens takes one kernel
that appends, and `attend`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tvm import relax, tirx

from moec.targets.kernels.cuda.attend import attend_func
from moec.targets.kernels.cuda.attend_product import AttendProduct, attend_product_func
from moec.targets.kernels.cuda.attention_parts import PAGE, append_func, page_shapes
from moec.targets.kernels.cuda.step import outputs, step_func
from moec.targets.kernels.cuda.step_spec import StepOptions, StepSpec
from moec.targets.kernels.specs import AttentionSpec

Get = Callable[[str, object, Callable[[], tirx.PrimFunc]], relax.GlobalVar]

__all__ = ["PAGE", "attention", "attention_step", "page_shapes", "takes_step"]


def takes_step(spec: AttentionSpec, tokens: int | None, dtype: str, memory: int) -> bool:
    """Whether `attention_step` serves calls of so many tokens (None: any number)."""
    return tokens is not None or AttendProduct.fits(spec, dtype, memory)


def attention(
    bb: relax.BlockBuilder, get: Get, caches: Sequence[relax.Expr], inputs: Sequence[relax.Expr], spec: AttentionSpec,
    dtype: str = "float32",
) -> relax.Var:  # fmt: skip
    """Emit attention of any number of tokens: caches (k_pool, v_pool), inputs (q, k, v, blocks, page_table[, sinks]) -> float32 [T, H*dv].

    Kernels come from `get` by their name and what tells them apart. The caches change in place.
    """
    q, k, v, blocks, table, *sinks = inputs
    count, kinds = q.ty.shape[0], [cache.ty for cache in caches]
    append = get("append", (spec, dtype), lambda: append_func(spec, dtype))
    found = bb.emit(relax.op.call_tir_inplace(append, relax.Tuple([*caches, k, v, blocks, table]), [0, 1], kinds))
    pools = [bb.emit(relax.TupleGetItem(found, i)) for i in (0, 1)]
    out = relax.TensorType((count, spec.heads * spec.dv), "float32")
    attend = get("attend", (spec, dtype), lambda: attend_func(spec, dtype))
    return bb.emit(relax.call_tir(attend, [*pools, q, blocks, table, *sinks], out_ty=out))


def attention_step(
    bb: relax.BlockBuilder, get: Get, caches: Sequence[relax.Expr], inputs: Sequence[relax.Expr], spec: StepSpec, options: StepOptions,
    dtype: str = "float32",
) -> relax.Var:  # fmt: skip
    """Emit attention where `takes_step`, with norms and rope: caches (k_pool, v_pool), other inputs of `Step` -> float32 [T, H*dv].

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
    many = get("attend_many", (a, dtype), lambda: attend_product_func(a, dtype))
    args = [k_pool, v_pool, *ready, inputs[3], inputs[4], *(inputs[-1:] if a.sinks else []), out]
    return bb.emit(relax.op.call_tir_inplace(many, relax.Tuple(args), [len(args) - 1], [outs[2]]))
