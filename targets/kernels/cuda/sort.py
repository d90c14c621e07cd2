"""Slots sorted by expert, the tiles of tokens that follow from it, and the sum over the slots of each token."""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from moec.targets.kernels.cuda.counting import EXPERTS, TOKENS, count, counts_argument
from moec.targets.kernels.cuda.emit import Expr, Shared, argument, at, const, kernel, local, store, strided, sync, when
from moec.targets.kernels.cuda.intrinsics import call, grid_launch, grid_wait, term
from moec.targets.kernels.cuda.layout import ceil_div
from moec.targets.kernels.cuda.loads import load4, write_words

THREADS = 512

_SCAN = r"""
#ifndef MOEC_SCAN
#define MOEC_SCAN
__device__ __forceinline__ int moec_scan(int x) {
  #pragma unroll
  for (int d = 1; d < 32; d *= 2) { const int y = __shfl_up_sync(0xffffffffu, x, d); if ((threadIdx.x & 31) >= d) x += y; }
  return x;
}
__device__ __forceinline__ void moec_count(int* p) { atomicAdd(p, 1); }
#endif
"""


def most_tiles(slots: Expr, experts: int, size: int) -> Expr:
    """The most tiles of up to `size` slots of one expert each that there can be."""
    return (min if isinstance(slots, int) else T.min)(slots, experts) + slots // size


def sort_func(
    experts: int, top_k: int, ids_dtype: str, size: int, tokens: int | None = None, counted: bool = False
) -> tirx.PrimFunc:  # fmt: skip
    """PrimFunc (ids [T, k], [counts], order int32 [S], places int32 [S], tiles int32 [most + 1, 4]): a stable sort of the slots by expert.

    order[i] is the slot at position i, places[s] the position of slot s or -1 if its id is outside of 0 to E - 1. A tile is (expert,
    first position, positions, 0), at most `size` positions; the last row has how many there are, and two zeros for who counts them.
    """
    warps = THREADS // 32

    def arguments() -> tuple[Any, ...]:
        t = tokens if tokens is not None else T.int64()
        slots = t * top_k
        ids, counts = argument("ids", (t, top_k), ids_dtype), counts_argument(counted)
        order, places = argument("order", (slots,), "int32"), argument("places", (slots,), "int32")
        most = most_tiles(slots, experts, size)
        return ids, order, places, argument("tiles", (most + 1, 4), "int32"), slots, most, counts

    def body(operands: tuple[Any, ...], memory: Shared, expert: Expr, thread: Expr) -> None:
        ids, order, places, tiles, slots, most, counts = operands
        histogram, sums = memory.take((experts,), "int32"), memory.take((4, warps), "int32")
        with strided(thread, experts, THREADS) as i:
            store(histogram, const(0, "int32"), i)
        sync()
        grid_wait()
        grid_launch()
        each = T.Bind((T.cast(slots, "int32") + THREADS - 1) // THREADS)
        begin = T.Bind(thread * each)
        length = T.Bind(T.max(T.min(each, T.cast(slots, "int32") - begin), 0))

        def id_at(i: Expr) -> Expr:
            return T.Bind(T.cast(ids[(begin + i) // top_k, (begin + i) % top_k], "int64"))

        own = local(1, "int32")
        store(own, const(0, "int32"), 0)
        with T.serial(length) as i:
            found = id_at(i)
            with T.If(T.And(found >= 0, found < experts)):
                with T.Then():
                    call("moec_count", _SCAN, at(histogram, T.cast(found, "int32")))
                    with when(found == T.cast(expert, "int64")):
                        store(own, own[0] + 1, 0)
                with T.Else(), when(expert == 0):
                    store(places, const(-1, "int32"), begin + i)
        sync()
        # Of the experts before this one: slots and tiles; of all: tiles; of the threads before this one: slots of this expert.
        values = local(4, "int32")
        for i in range(3):
            store(values, const(0, "int32"), i)
        store(values, own[0], 3)
        with strided(thread, experts, THREADS) as e:
            those = T.Bind(histogram[e])
            here = T.Bind((those + size - 1) // size)
            store(values, values[2] + here, 2)
            with when(e < expert):
                store(values, values[0] + those, 0)
                store(values, values[1] + here, 1)
        scans = local(4, "int32")
        for i in range(4):
            store(scans, call("moec_scan", _SCAN, values[i], result="int32"), i)
            with when(thread % 32 == 31):
                store(sums, scans[i], i, thread // 32)
        sync()
        totals = local(4, "int32")
        for i in range(4):
            store(totals, const(0, "int32"), i)
            for warp in range(warps):
                with when(T.Or(T.bool(i < 3), warp < thread // 32)):
                    store(totals, totals[i] + sums[i, warp], i)
        first, mine = T.Bind(totals[0]), T.Bind(histogram[expert])
        with when(T.And(thread == 0, expert == 0)):
            store(tiles, totals[2], most, 0)
            for column in (1, 2):
                store(tiles, const(0, "int32"), most, column)
            if counts is not None:
                count(counts, TOKENS, slots // top_k)
        if counts is not None:
            with when(T.And(thread == 0, mine > 0)):
                count(counts, EXPERTS, mine)
        with strided(thread, (mine + size - 1) // size, THREADS) as i:
            for column, value in enumerate((expert, first + i * size, T.min(mine - i * size, size), const(0, "int32"))):
                store(tiles, value, totals[1] + i, column)
        place = local(1, "int32")
        store(place, first + totals[3] + scans[3] - own[0], 0)
        with T.serial(length) as i, when(id_at(i) == T.cast(expert, "int64")):
            store(order, begin + i, place[0])
            store(places, place[0], begin + i)
            store(place, place[0] + 1, 0)

    return kernel("sort", THREADS, arguments, lambda _: [experts], body, words=ceil_div(experts, 4) * 4 + 4 * warps)


def combine_func(d: int, top_k: int, dtype: str, tokens: int | None = None, result: str | None = None) -> tirx.PrimFunc:
    """PrimFunc (y [S, D], places [S], out [T, D]): the sum of what the slots of each token give, in their order.

    A thread has 16 bytes of a slot at a time (D is a multiple of 8), and asks for those of all slots before it adds up the first.

    Args:
        dtype, result: of y, and of the output, if that is another.
    """
    threads, each = 256, 8 if dtype == "bfloat16" else 4
    assert d % each == 0, d

    def arguments() -> tuple[Any, ...]:
        t = tokens if tokens is not None else T.int64()
        slots = t * top_k
        y, places = argument("y", (slots, d), dtype), argument("places", (slots,), "int32")
        return y, places, argument("out", (t, d), result or dtype), t

    def body(operands: tuple[Any, ...], memory: Shared, token: Expr, thread: Expr) -> None:
        y, places, out, _ = operands
        del memory
        grid_wait()
        grid_launch()
        own, values = local(top_k, "int32"), local(top_k * each, "float32")
        for slot in range(top_k):
            store(own, places[token * top_k + slot], slot)
        with strided(thread, d // each, threads) as piece:
            for slot in range(top_k):
                row = T.max(own[slot], 0)  # of a slot that runs no expert nothing was written
                for part in range(0, each, 4):
                    load4(at(values, slot * each + part), at(y, row, piece * each + part), dtype)
            totals = local(each, "float32")
            for i in range(each):
                store(totals, const(0.0, "float32"), i)
                for slot in range(top_k):
                    store(totals, totals[i] + T.Select(own[slot] >= 0, values[slot * each + i], const(0.0, "float32")), i)
            if (result or dtype) == "float32":
                for part in range(0, each, 4):
                    words = [T.reinterpret("uint32", totals[part + i]) for i in range(4)]
                    write_words(at(out, token, piece * each + part), words)
            else:
                write_words(at(out, token, piece * 8), [term(totals[i], totals[i + 1], 0) for i in range(0, 8, 2)])

    return kernel("combine", threads, arguments, lambda operands: [operands[-1]], body)
