"""How the warps of a block share out the weights of several experts as one stream, each by the same amount of work."""

from __future__ import annotations

from collections.abc import Callable

from tvm.tirx.script import builder as T

from moec.targets.kernels.cuda.emit import Expr, Shared, at, const, local, store, strided, sync, when
from moec.targets.kernels.cuda.intrinsics import call
from moec.targets.kernels.cuda.layout import ceil_div
from moec.targets.kernels.cuda.routing import Routing
from moec.targets.kernels.cuda.stored import Classes

_SHARE = r"""
#ifndef MOEC_SHARE
#define MOEC_SHARE
__device__ __forceinline__ void moec_starts(int* work, int count) {  // work[r] becomes what is before rank r; the first warp comes here
  const int lane = threadIdx.x & 31;
  int before = 0;
  for (int base = 0; base < count; base += 32) {
    const int own = base + lane < count ? work[base + lane] : 0;
    int sum = own;
    for (int d = 1; d < 32; d *= 2) { const int y = __shfl_up_sync(0xffffffffu, sum, d); if (lane >= d) sum += y; }
    if (base + lane < count) work[base + lane] = before + sum - own;
    before += __shfl_sync(0xffffffffu, sum, 31);
  }
  if (lane == 0) work[count] = before;
}
__device__ __forceinline__ int moec_rank_at(const int* starts, int count, int place) {  // the last rank that starts there or before
  const int lane = threadIdx.x & 31;
  int found = 0;
  for (int base = 0; base < count; base += 32)
    found += __popc(__ballot_sync(0xffffffffu, base + lane < count && starts[base + lane] <= place));
  return found - 1;
}
#endif
"""


def words(ranks: int, mixed: bool) -> int:
    """Words of a block's memory that `each_share` takes."""
    return ceil_div(ranks + 1, 4) * 4 if mixed else 0


def each_share(
    weights: Classes, routing: Routing, ranks: int, memory: Shared, warp: Expr, warps: int, thread: Expr,
    act: Callable[[Expr, Expr, Expr, Expr], None],
) -> None:  # fmt: skip
    """act(rank, expert, start, stop) for each expert of which a warp has a share: blocks start to stop of its rows.

    Args:
        ranks: the most that run.
    """
    blocks = weights.blocks
    if not weights.stack.mixed:
        total = T.Bind(routing.count * blocks)
        begin, end = T.Bind(warp * total // warps), T.Bind((warp + 1) * total // warps)
        with T.serial((end + blocks - 1) // blocks - begin // blocks) as i:
            rank = T.Bind(begin // blocks + i)
            expert = T.Bind(routing.expert(rank))
            with when(expert >= 0):
                act(rank, expert, T.Bind(T.max(begin - rank * blocks, 0)), T.Bind(T.min(end - rank * blocks, blocks)))
        return
    starts = memory.take((ranks + 1,), "int32")
    with strided(thread, routing.count, warps * 32) as r:
        own, cost = T.Bind(routing.expert(r)), local(1, "int32")
        store(cost, const(0, "int32"), 0)
        with when(own >= 0):
            store(cost, weights.cost(own) * blocks, 0)
        store(starts, cost[0], r)
    sync()
    with T.If(thread < 32), T.Then():
        call("moec_starts", _SHARE, at(starts, 0), routing.count)
    sync()
    count = T.Bind(routing.count)
    total = T.Bind(starts[count])
    begin, end = T.Bind(warp * total // warps), T.Bind((warp + 1) * total // warps)
    first = T.Bind(call("moec_rank_at", _SHARE, at(starts, 0), count, begin, result="int32"))
    last = T.Bind(call("moec_rank_at", _SHARE, at(starts, 0), count, end - 1, result="int32"))
    with T.serial(T.Select(begin < end, last - first + 1, const(0, "int32"))) as i:
        rank = T.Bind(first + i)
        expert = T.Bind(routing.expert(rank))
        with when(expert >= 0):
            cost_of = T.Bind(weights.cost(expert))
            before, after = T.Bind(T.max(begin - starts[rank], 0)), T.Bind(end - starts[rank])
            start, stop = T.Bind((before + cost_of - 1) // cost_of), T.Bind(T.min((after + cost_of - 1) // cost_of, blocks))
            act(rank, expert, start, stop)
