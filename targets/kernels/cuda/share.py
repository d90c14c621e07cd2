"""How the warps of a block share out the blocks of all experts that run, as one stream: each has a part of equal size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tvm.tirx.script import builder as T

from moec.targets.kernels.cuda.emit import Buffer, Expr, Shared, at, const, local, store, strided, sync, when
from moec.targets.kernels.cuda.intrinsics import call
from moec.targets.kernels.cuda.layout import ceil_div
from moec.targets.kernels.cuda.routing import Routing
from moec.targets.kernels.cuda.stream import Weights

_BELOW = r"""
#ifndef MOEC_BELOW
#define MOEC_BELOW
__device__ __forceinline__ int moec_below(const int* p, int n, int x) {
  int found = 0;
  for (int base = 0; base < n; base += 32) {
    const int i = base + (threadIdx.x & 31);
    found += __popc(__ballot_sync(0xffffffffu, i < n && p[i] < x));
  }
  return found;
}
#endif
"""


class Share:
    """Experts of `blocks` each."""

    def __init__(self, routing: Routing, blocks: int) -> None:
        self._blocks, self.total = blocks, routing.count * blocks

    @contextmanager
    def each(self, begin: Expr, end: Expr) -> Iterator[Expr]:
        """The body for every rank that has blocks from begin to end."""
        blocks = self._blocks
        with T.serial((end + blocks - 1) // blocks - begin // blocks) as i:
            yield T.Bind(begin // blocks + i)

    def part(self, rank: Expr, expert: Expr, begin: Expr, end: Expr) -> tuple[Expr, Expr]:
        """Which of the blocks of a rank, that runs an expert, are from begin to end."""
        del expert
        first = rank * self._blocks
        return T.Bind(T.max(begin - first, 0)), T.Bind(T.min(end - first, self._blocks))


class RaggedShare(Share):
    """Experts that differ in their blocks, or in the work of one: where each rank's work begins is in a table of the block's memory.

    Args:
        memory: has `words(ranks)` left.
        ranks: the most that there are; those that run nothing have no blocks.
    """

    def __init__(self, routing: Routing, weights: Weights, memory: Shared, ranks: int, thread: Expr, threads: int) -> None:
        self._ranks, self._weights = ranks, weights
        sizes = memory.take((ranks,), "int32")
        self._begins: Buffer = memory.take((ranks + 1,), "int32")
        with strided(thread, ranks, threads) as rank:
            store(sizes, const(0, "int32"), rank)
            with when(rank < routing.count):
                expert = T.Bind(routing.expert(rank))
                with when(expert >= 0):
                    store(sizes, weights.blocks_of(expert) * weights.cost(expert), rank)
        sync()
        with strided(thread, ranks + 1, threads) as rank:
            total = local(1, "int32")
            store(total, const(0, "int32"), 0)
            with T.serial(rank) as before:
                store(total, total[0] + sizes[before], 0)
            store(self._begins, total[0], rank)
        sync()
        self.total = self._begins[ranks]

    @staticmethod
    def words(ranks: int) -> int:
        """Words of a block's memory."""
        return (ceil_div(ranks, 4) + ceil_div(ranks + 1, 4)) * 4

    @contextmanager
    def each(self, begin: Expr, end: Expr) -> Iterator[Expr]:
        """See `Share`."""

        def below(first: int, x: Expr) -> Expr:
            return T.Bind(call("moec_below", _BELOW, at(self._begins, first), self._ranks, x, result="int32"))

        first, stop = below(1, begin + 1), below(0, end)
        with T.serial(T.max(stop - first, 0)) as i:
            yield T.Bind(first + i)

    def part(self, rank: Expr, expert: Expr, begin: Expr, end: Expr) -> tuple[Expr, Expr]:
        """See `Share`."""
        first, after, cost = T.Bind(self._begins[rank]), T.Bind(self._begins[rank + 1]), T.Bind(self._weights.cost(expert))

        def block(place: Expr) -> Expr:
            return T.Bind((place - first + cost - 1) // cost)

        return block(T.max(begin, first)), block(T.min(end, after))
