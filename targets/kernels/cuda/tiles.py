"""The tiles of tokens that a block of threads works through, one after the other."""

from __future__ import annotations

from collections.abc import Callable

from tvm.tirx.script import builder as T

from moec.targets.kernels.cuda.cluster import cluster_sync, cluster_write
from moec.targets.kernels.cuda.copies import shared_address
from moec.targets.kernels.cuda.emit import Buffer, Expr, at, const, local, store, sync, when
from moec.targets.kernels.cuda.intrinsics import call
from moec.targets.kernels.cuda.layout import ceil_div


class Tile:
    """The tile that a block of threads works on, and the next: (expert, first position, positions, part of the rows, number).

    Args:
        parts: of the rows; the blocks of a cluster take `each` that follow each other.
        together: tiles that are worked on at about the same time, so that weights cross the memory once for them.
        rank: of the block in its cluster.
    """

    def __init__(self, tiles: Buffer, parts: int, each: int = 1, rank: Expr = 0, together: int = 1) -> None:
        self._tiles, self._each, self._rank, self.parts, self._together = tiles, each, rank, ceil_div(parts, each), together
        self._state, self._next, self._kept = (local(5, "int32") for _ in range(3))

    def look(self, work: Expr) -> None:
        """Read the tile of a piece of work as the next one: some tiles with one part of the rows, then with the next."""
        group = T.Bind(work // (self._together * self.parts))
        inner = T.Bind(work - group * (self._together * self.parts))
        here = T.Bind(T.min(self._tiles[self._tiles.shape[0] - 1, 0] - group * self._together, self._together))
        number = T.Bind(group * self._together + inner % here)
        for i in range(3):
            store(self._next, self._tiles[number, i], i)
        store(self._next, inner // here * self._each + self._rank, 3)
        store(self._next, number, 4)

    def advance(self) -> None:
        """Take the next one, and keep this one for what is left to do."""
        for i in range(5):
            store(self._kept, self._state[i], i)
            store(self._state, self._next[i], i)

    def now(self) -> list[Expr]:
        """The tile that is worked on."""
        return [T.Bind(self._state[i]) for i in range(5)]

    def kept(self) -> list[Expr]:
        """What was kept."""
        return [T.Bind(self._kept[i]) for i in range(5)]


_TAKE = r"""
#ifndef MOEC_TAKE
#define MOEC_TAKE
__device__ __forceinline__ int moec_take(const void* p) { return atomicAdd((int*)p, 1); }
#endif
"""


class Takes:
    """Work that blocks of threads take when they have time for it, and not by their number: some tiles have fewer tokens than others.

    Args:
        counter: the address of an int32 of the GPU's memory that is zero when the kernel begins.
        memory: int32 [2] that the block shares.
        cluster: blocks that take the same work.
        leads: whether this thread takes it for all of them.
    """

    def __init__(self, counter: Expr, memory: Buffer, cluster: int, leads: Expr) -> None:
        self._counter, self._memory, self._cluster, self._leads = counter, memory, cluster, leads
        self._turn, self._own = local(1, "int32"), local(1, "int32")
        store(self._turn, const(0, "int32"), 0)

    def ask(self) -> None:
        """Take a number, which takes a while to come."""
        with when(self._leads):
            store(self._own, call("moec_take", _TAKE, self._counter, result="int32"), 0)

    def tell(self) -> None:
        """Share the number that was asked for; `taken` gives it once all threads have met."""
        with when(self._leads):
            if self._cluster == 1:
                store(self._memory, self._own[0], self._turn[0])
            else:
                for rank in range(self._cluster):
                    cluster_write(shared_address(at(self._memory, self._turn[0])), rank, self._own[0])

    def meet(self) -> None:
        """Wait for all threads."""
        if self._cluster == 1:
            sync()
        else:
            cluster_sync()

    def taken(self) -> Expr:
        """The number."""
        found = T.Bind(self._memory[self._turn[0]])
        store(self._turn, 1 - self._turn[0], 0)  # the next one must not come before all threads have read this one
        return found


def each_tile(
    tile: Tile, total: Expr, block: Expr, blocks: Expr, begin: Callable[[bool], None], run: Callable[[], None],
    finish: Callable[[], None], takes: Takes | None = None,
) -> None:  # fmt: skip
    """One piece of work after the other, the next one's first loads under way while the last one's results are written.

    The first piece of a block is its number, the second that and how many blocks there are; others follow in steps of that, or are taken.
    """
    now, following = local(1, "int32"), local(1, "int32")
    store(now, block, 0)
    store(following, block + blocks, 0)
    with when(block < total):
        tile.look(block)
        tile.advance()
        begin(True)
        with T.While(now[0] < total):
            if takes is not None:
                takes.ask()
            with when(following[0] < total):
                tile.look(following[0])
            run()
            if takes is not None:
                takes.tell()
                takes.meet()  # all warps are done with the stages
            else:
                sync()
            tile.advance()
            with when(following[0] < total):
                begin(False)
            finish()
            store(now, following[0], 0)
            store(following, following[0] + blocks if takes is None else 2 * blocks + takes.taken(), 0)
