"""Slots sorted by expert, the tiles of tokens that follow from it, and the sum over the slots of each token."""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from moec.targets.kernels.cuda.emit import Buffer, Expr, Shared, argument, at, const, kernel, local, store, strided, sync, when
from moec.targets.kernels.cuda.intrinsics import call, grid_launch, grid_wait

THREADS = 512

_SCAN = r"""
#ifndef MOEC_SCAN
#define MOEC_SCAN
__device__ __forceinline__ int moec_scan(int x) {
  #pragma unroll
  for (int d = 1; d < 32; d *= 2) { const int y = __shfl_up_sync(0xffffffffu, x, d); if ((threadIdx.x & 31) >= d) x += y; }
  return x;
}
__device__ __forceinline__ void moec_find(int* found, const int* starts, int experts, int tile, int size) {
  found[0] = -1; found[1] = 0; found[2] = 0;
  for (int e0 = 0; e0 < experts; e0 += 32) {
    const int e = e0 + (threadIdx.x & 31);
    const int first = e < experts ? starts[e] : 0, count = e < experts ? starts[e + 1] - first : 0;
    const int tiles = (count + size - 1) / size, upto = moec_scan(tiles);
    const unsigned int here = __ballot_sync(0xffffffffu, tile < upto);
    if (here) {
      const int lane = __ffs(here) - 1;
      const int inside = tile - __shfl_sync(0xffffffffu, upto - tiles, lane);
      found[0] = e0 + lane;
      found[1] = __shfl_sync(0xffffffffu, first, lane) + inside * size;
      found[2] = min(size, __shfl_sync(0xffffffffu, count, lane) - inside * size);
      return;
    }
    tile -= __shfl_sync(0xffffffffu, upto, 31);
  }
}
#endif
"""


def sort_func(experts: int, top_k: int, ids_dtype: str, tokens: int | None = None) -> tirx.PrimFunc:
    """PrimFunc (ids [T, k], order int32 [S], places int32 [S], starts int32 [E + 1]): a stable sort of the slots by expert.

    order[i] is the slot at position i, places[s] the position of slot s or -1 if its id is outside of 0 to E - 1.
    """
    warps = THREADS // 32

    def arguments() -> tuple[Any, ...]:
        t = tokens if tokens is not None else T.int64()
        slots = t * top_k
        ids = argument("ids", (t, top_k), ids_dtype)
        order, places = argument("order", (slots,), "int32"), argument("places", (slots,), "int32")
        return ids, order, places, argument("starts", (experts + 1,), "int32"), slots

    def body(operands: tuple[Any, ...], memory: Shared, expert: Expr, thread: Expr) -> None:
        ids, order, places, starts, slots = operands
        sums = memory.take((2, warps), "int32")
        grid_wait()
        grid_launch()
        each = T.Bind((T.cast(slots, "int32") + THREADS - 1) // THREADS)
        begin = T.Bind(thread * each)
        end = T.Bind(T.min(begin + each, T.cast(slots, "int32")))
        counts = local(2, "int32")
        for i in range(2):
            store(counts, const(0, "int32"), i)
        with T.serial(T.max(end - begin, 0)) as i:
            found = T.Bind(T.cast(ids[(begin + i) // top_k, (begin + i) % top_k], "int64"))
            with when(T.And(found >= 0, found < T.cast(expert, "int64"))):
                store(counts, counts[0] + 1, 0)
            with when(found == T.cast(expert, "int64")):
                store(counts, counts[1] + 1, 1)
            with when(T.And(expert == 0, T.Or(found < 0, found >= experts))):
                store(places, const(-1, "int32"), begin + i)
        scan = local(2, "int32")
        for i in range(2):
            store(scan, call("moec_scan", _SCAN, counts[i], result="int32"), i)
            with when(thread % 32 == 31):
                store(sums, scan[i], i, thread // 32)
        sync()
        before, less, equal = local(1, "int32"), local(1, "int32"), local(1, "int32")
        for buffer in (before, less, equal):
            store(buffer, const(0, "int32"), 0)
        for warp in range(warps):
            with when(warp < thread // 32):
                store(before, before[0] + sums[1, warp], 0)
            store(less, less[0] + sums[0, warp], 0)
            store(equal, equal[0] + sums[1, warp], 0)
        with when(thread == 0):
            store(starts, less[0], expert)
            with when(expert == experts - 1):
                store(starts, less[0] + equal[0], experts)
        place = local(1, "int32")
        store(place, less[0] + before[0] + scan[1] - counts[1], 0)
        with (
            T.serial(T.max(end - begin, 0)) as i,
            when(T.cast(ids[(begin + i) // top_k, (begin + i) % top_k], "int64") == T.cast(expert, "int64")),
        ):
            store(order, begin + i, place[0])
            store(places, place[0], begin + i)
            store(place, place[0] + 1, 0)

    return kernel("sort", THREADS, arguments, lambda _: [experts], body, words=2 * warps)


def find_tile(starts: Buffer, experts: int, tile: Expr, size: int) -> tuple[Expr, Expr, Expr]:
    """(expert, first position, positions) of the tile of at most `size` positions of one expert; the expert is -1 past the last."""
    found = local(3, "int32")
    call("moec_find", _SCAN, at(found, 0), at(starts, 0), experts, tile, size)
    expert, first, count = (T.Bind(found[i]) for i in range(3))
    return expert, first, count


def combine_func(d: int, top_k: int, dtype: str, tokens: int | None = None) -> tirx.PrimFunc:
    """PrimFunc (y [S, D], places [S], out [T, D]): the sum of what the slots of each token give, in their order."""
    threads = 256

    def arguments() -> tuple[Any, ...]:
        t = tokens if tokens is not None else T.int64()
        slots = t * top_k
        return (
            argument("y", (slots, d), dtype), argument("places", (slots,), "int32"), argument("out", (t, d), dtype), t
        )  # fmt: skip

    def body(operands: tuple[Any, ...], memory: Shared, token: Expr, thread: Expr) -> None:
        y, places, out, _ = operands
        del memory
        grid_wait()
        grid_launch()
        with strided(thread, d, threads) as column:
            total = local(1, "float32")
            store(total, const(0.0, "float32"), 0)
            for slot in range(top_k):
                place = T.Bind(places[token * top_k + slot])
                with when(place >= 0):
                    store(total, total[0] + T.cast(y[place, column], "float32"), 0)
            store(out, T.cast(total[0], dtype), token, column)

    return kernel("combine", threads, arguments, lambda operands: [operands[-1]], body)
