"""The counts of a layer's experts, int64 [8]: tokens, experts that ran for them, and none other yet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import relax
from tvm.tirx.script import builder as T

from moec.runtime.counters import COUNTS
from moec.targets.kernels.cuda.emit import Buffer, Expr, argument, at
from moec.targets.kernels.cuda.intrinsics import call

TOKENS, EXPERTS = 0, 1

_COUNT_UP = r"""
#ifndef MOEC_COUNT_UP
#define MOEC_COUNT_UP
__device__ __forceinline__ void moec_count_up(void* p, long long x) { atomicAdd((unsigned long long*)p, (unsigned long long)x); }
#endif
"""


def counts_argument(counted: bool) -> Buffer | None:
    """The next parameter, of a kernel that counts."""
    return argument("counts", (COUNTS,), "int64") if counted else None


def count(counts: Buffer, which: int, amount: Expr) -> None:
    """Add to one of the counts, atomically."""
    call("moec_count_up", _COUNT_UP, at(counts, which), T.cast(amount, "int64"))


def call_counting(bb: relax.BlockBuilder, function: Any, args: Sequence[Any], counts: Any, *outs: relax.TensorType) -> list[relax.Var]:
    """Call a kernel (args..., [counts], outs...) that adds to counts, if any; returns its other results."""
    if counts is None:
        found = bb.emit(relax.call_tir(function, list(args), out_ty=outs[0] if len(outs) == 1 else list(outs)))
        return [found] if len(outs) == 1 else [bb.emit(relax.TupleGetItem(found, i)) for i in range(len(outs))]
    inplace, types = [len(args), *[-1] * len(outs)], [counts.ty, *outs]
    found = bb.emit(relax.op.call_tir_inplace(function, relax.Tuple([*args, counts]), inplace, types))
    return [bb.emit(relax.TupleGetItem(found, 1 + i)) for i in range(len(outs))]
