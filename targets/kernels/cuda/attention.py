"""Attention over a paged cache of keys and values: append the new tokens, then attend.

The cache of a layer is two arrays of pages of `PAGE` tokens, K [pages, HK, PAGE, d] and V [pages, HK, PAGE, dv], float32 or bfloat16 (as
its bits). Tokens come as blocks, as in the CPU kernel: `blocks` holds (row of the page table, first token, number of tokens, first
position) of each.

One token takes one kernel that appends on the way, over blocks that split the context among them (https://arxiv.org/abs/2311.01282), and
one that adds their parts up.
"""

from __future__ import annotations

from collections.abc import Sequence

from tvm import relax, tirx

from moec.targets.kernels.cuda.attend import Split, attend_func
from moec.targets.kernels.cuda.attention_parts import PAGE, append_func, combine_func, page_shapes
from moec.targets.kernels.specs import AttentionSpec

__all__ = ["PAGE", "attention", "page_shapes"]


def attention(
    bb: relax.BlockBuilder, caches: Sequence[relax.Expr], inputs: Sequence[relax.Expr], spec: AttentionSpec, dtype: str = "float32"
) -> relax.Var:
    """Emit attention: caches (k_pool, v_pool), inputs (q, k, v, blocks, page_table[, sinks]) -> float32 [T, H*dv].

    The caches change in place.
    """
    q, k, v, blocks, table, *sinks = inputs
    count, kinds = q.ty.shape[0], [cache.ty for cache in caches]
    if isinstance(count, tirx.IntImm) and int(count) == 1:
        splits = Split.of(spec, 1).splits
        func = bb.add_func(attend_func(spec, 1, dtype), "attend")
        outs = [relax.TensorType((splits, spec.heads, spec.dv), "float32"), relax.TensorType((splits, spec.heads, 2), "float32")]
        args = relax.Tuple([*caches, *inputs])
        found = bb.emit(relax.op.call_tir_inplace(func, args, [0, 1, -1, -1], [*kinds, *outs]))
        parts = [bb.emit(relax.TupleGetItem(found, i)) for i in (2, 3)]
        out = relax.TensorType((1, spec.heads * spec.dv), "float32")
        return bb.emit(relax.call_tir(bb.add_func(combine_func(spec, splits), "combine"), parts, out_ty=out))
    append = bb.add_func(append_func(spec, dtype), "append")
    found = bb.emit(relax.op.call_tir_inplace(append, relax.Tuple([*caches, k, v, blocks, table]), [0, 1], kinds))
    pools = [bb.emit(relax.TupleGetItem(found, i)) for i in (0, 1)]
    out = relax.TensorType((count, spec.heads * spec.dv), "float32")
    return bb.emit(relax.call_tir(bb.add_func(attend_func(spec, None, dtype), "attend"), [*pools, q, blocks, table, *sinks], out_ty=out))
