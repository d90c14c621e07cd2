"""Slots sorted by expert, the tiles of tokens that follow from it, and the sum over the slots of each token."""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from moec.targets.kernels.cuda.counting import EXPERTS, TOKENS, count, counts_argument
from moec.targets.kernels.cuda.emit import Buffer, Expr, Shared, argument, at, const, kernel, local, store, strided, sync, when
from moec.targets.kernels.cuda.intrinsics import call, grid_launch, grid_wait, term
from moec.targets.kernels.cuda.layout import ceil_div
from moec.targets.kernels.cuda.loads import load4, write_words

THREADS = 512
TURN = 8  # ids of a lane that are on their way at once

_SCAN = r"""
#ifndef MOEC_SCAN
#define MOEC_SCAN
__device__ __forceinline__ int moec_scan(int x) {
  #pragma unroll
  for (int d = 1; d < 32; d *= 2) { const int y = __shfl_up_sync(0xffffffffu, x, d); if ((threadIdx.x & 31) >= d) x += y; }
  return x;
}
__device__ __forceinline__ void moec_count(int* p) { atomicAdd(p, 1); }
__device__ __forceinline__ unsigned int moec_vote(bool x) { return __ballot_sync(0xffffffffu, x); }
__device__ __forceinline__ int moec_votes(unsigned int votes) { return __popc(votes); }
__device__ __forceinline__ int moec_votes_before(unsigned int votes) { return __popc(votes & ((1u << (threadIdx.x & 31)) - 1)); }
#endif
"""

OUTSIDE, BEYOND = -1, -2
"""What stands for an id that no expert has, and for a slot that there is none of."""


def most_tiles(slots: Expr, experts: int, size: int) -> Expr:
    """The most tiles of up to `size` slots of one expert each that there can be."""
    return (min if isinstance(slots, int) else T.min)(slots, experts) + slots // size


class Slots:
    """The slots that a warp of a block of `THREADS` reads: its part of all of them, whose neighbours its lanes have, some turns of `TURN`.

    Args:
        ids: [T, k].
        experts: E.
    """

    def __init__(self, ids: Buffer, slots: Expr, experts: int, thread: Expr) -> None:
        self._ids, self._experts, self.lane, self.warp = ids, experts, T.Bind(thread % 32), T.Bind(thread // 32)
        each = T.Bind((slots + THREADS - 1) // THREADS * 32)
        self._begin = T.Bind(self.warp * each)
        self._end = T.Bind(T.min(self._begin + each, slots))
        self.turns = T.Bind((T.max(self._end - self._begin, 0) + (32 * TURN - 1)) // (32 * TURN))

    def slot(self, turn: Expr, u: int) -> Expr:
        """This lane's slot, number u of a turn."""
        return self._begin + (turn * TURN + u) * 32 + self.lane

    def read(self, turn: Expr) -> Buffer:
        """The ids of a turn, which are all asked for before the first one is used: int32 [TURN], OUTSIDE or BEYOND where none is."""
        found, top_k = local(TURN, "int32"), self._ids.shape[1]
        for u in range(TURN):
            i = T.Bind(self.slot(turn, u))
            store(found, const(BEYOND, "int32"), u)
            with when(i < self._end):
                value = T.Bind(T.cast(self._ids[i // top_k, i % top_k], "int64"))
                inside = T.And(value >= 0, value < self._experts)
                store(found, T.Select(inside, T.cast(value, "int32"), const(OUTSIDE, "int32")), u)
        return found


def _vote(x: Expr) -> Expr:
    """For which lanes x is true."""
    return T.Bind(call("moec_vote", _SCAN, x, result="uint32"))


def _sums(values: Buffer, own: Expr, sums: Buffer, slots: Slots) -> Buffer:
    """Of each of three values the sum over all threads, and of `own` that over the warps before, which have one each: int32 [4]."""
    for i in range(3):
        scan = T.Bind(call("moec_scan", _SCAN, values[i], result="int32"))
        with when(slots.lane == 31):
            store(sums, scan, i, slots.warp)
    with when(slots.lane == 31):
        store(sums, own, 3, slots.warp)
    sync()
    totals = local(4, "int32")
    for i in range(4):
        store(totals, const(0, "int32"), i)
        for other in range(THREADS // 32):
            with when(T.Or(T.bool(i < 3), other < slots.warp)):
                store(totals, totals[i] + sums[i, other], i)
    return totals


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
        ids, order, places, tiles, count_of_slots, most, counts = operands
        histogram, sums = memory.take((experts,), "int32"), memory.take((4, warps), "int32")
        with strided(thread, experts, THREADS) as i:
            store(histogram, const(0, "int32"), i)
        sync()
        grid_wait()
        grid_launch()
        slots, own = Slots(ids, T.cast(count_of_slots, "int32"), experts, thread), local(1, "int32")
        store(own, const(0, "int32"), 0)
        with T.serial(slots.turns) as turn:
            found = slots.read(turn)
            for u in range(TURN):
                with when(found[u] >= 0):
                    call("moec_count", _SCAN, at(histogram, found[u]))
                with when(T.And(expert == 0, found[u] == OUTSIDE)):
                    store(places, const(-1, "int32"), slots.slot(turn, u))
                store(own, own[0] + call("moec_votes", _SCAN, _vote(found[u] == expert), result="int32"), 0)
        sync()
        values = local(3, "int32")  # of the experts before this one: slots and tiles; of all: tiles
        for i in range(3):
            store(values, const(0, "int32"), i)
        with strided(thread, experts, THREADS) as e:
            those = T.Bind(histogram[e])
            here = T.Bind((those + size - 1) // size)
            store(values, values[2] + here, 2)
            with when(e < expert):
                store(values, values[0] + those, 0)
                store(values, values[1] + here, 1)
        totals = _sums(values, own[0], sums, slots)
        first, mine = T.Bind(totals[0]), T.Bind(histogram[expert])
        with when(T.And(thread == 0, expert == 0)):
            store(tiles, totals[2], most, 0)
            for column in (1, 2):
                store(tiles, const(0, "int32"), most, column)
            if counts is not None:
                count(counts, TOKENS, count_of_slots // top_k)
        if counts is not None:
            with when(T.And(thread == 0, mine > 0)):
                count(counts, EXPERTS, mine)
        with strided(thread, (mine + size - 1) // size, THREADS) as i:
            for column, value in enumerate((expert, first + i * size, T.min(mine - i * size, size), const(0, "int32"))):
                store(tiles, value, totals[1] + i, column)
        _write(slots, T.Bind(T.Select(mine > 0, slots.turns, 0)), expert, first + totals[3], order, places)

    return kernel("sort", THREADS, arguments, lambda _: [experts], body, words=ceil_div(experts, 4) * 4 + 4 * warps)


def _write(slots: Slots, turns: Expr, expert: Expr, first: Expr, order: Buffer, places: Buffer) -> None:
    """Write what the warp has of an expert's slots, from position `first` on."""
    place = local(1, "int32")
    store(place, first, 0)
    with T.serial(turns) as turn:
        found = slots.read(turn)
        for u in range(TURN):
            those = _vote(found[u] == expert)
            with when(found[u] == expert):
                here = T.Bind(place[0] + call("moec_votes_before", _SCAN, those, result="int32"))
                store(order, slots.slot(turn, u), here)
                store(places, here, slots.slot(turn, u))
            store(place, place[0] + call("moec_votes", _SCAN, those, result="int32"), 0)


def combine_func(d: int, top_k: int, dtype: str, tokens: int | None = None, result: str | None = None) -> tirx.PrimFunc:
    """PrimFunc (y [S, D], places [S], weights f32 [T, k], out [T, D]): the sum of what a token's slots give times their weights, in order.

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
        return y, places, argument("weights", (t, top_k), "float32"), argument("out", (t, d), result or dtype), t

    def body(operands: tuple[Any, ...], memory: Shared, token: Expr, thread: Expr) -> None:
        y, places, weights, out, _ = operands
        del memory
        grid_wait()
        grid_launch()
        own, shares, values = local(top_k, "int32"), local(top_k, "float32"), local(top_k * each, "float32")
        for slot in range(top_k):
            store(own, places[token * top_k + slot], slot)
            store(shares, weights[token, slot], slot)
        with strided(thread, d // each, threads) as piece:
            for slot in range(top_k):
                row = T.max(own[slot], 0)  # of a slot that runs no expert nothing was written
                for part in range(0, each, 4):
                    load4(at(values, slot * each + part), at(y, row, piece * each + part), dtype)
            totals = local(each, "float32")
            for i in range(each):
                store(totals, const(0.0, "float32"), i)
                for slot in range(top_k):
                    store(totals, totals[i] + T.Select(own[slot] >= 0, values[slot * each + i] * shares[slot], const(0.0, "float32")), i)
            if (result or dtype) == "float32":
                for part in range(0, each, 4):
                    words = [T.reinterpret("uint32", totals[part + i]) for i in range(4)]
                    write_words(at(out, token, piece * each + part), words)
            else:
                write_words(at(out, token, piece * 8), [term(totals[i], totals[i + 1], 0) for i in range(0, 8, 2)])

    return kernel("combine", threads, arguments, lambda operands: [operands[-1]], body)
