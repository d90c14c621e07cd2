"""Activations in memory as the tensor cores read them: one instruction copies a stage, into the blocks of a cluster at once.

An image [tiles, blocks of 128 columns, tokens * 128] bfloat16 has, for each tile of tokens, the stages of `matrix` one after the other: of
two halves of 64 columns, rows of 128 bytes whose 16-byte pieces are exchanged. `arrange` makes it of x, and `gate_up` writes it for `down`.

Blocks of threads of a cluster work on different rows of weights with the same tokens: each copies its share of a stage into all of them, so
that activations cross the L2 cache once a cluster. A stage has two barriers in shared memory: `full`, when its bytes have come, and
`empty`, when all warps of the cluster are done with it (PTX ISA, "mbarrier" and "cp.async.bulk").
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from moec.targets.kernels.cuda.copies import shared_address
from moec.targets.kernels.cuda.emit import Buffer, Expr, Shared, argument, at, const, kernel, local, store, strided, when
from moec.targets.kernels.cuda.intrinsics import call, grid_launch, grid_wait
from moec.targets.kernels.cuda.layout import BLOCK, ceil_div
from moec.targets.kernels.cuda.loads import move
from moec.targets.kernels.cuda.matrix import descriptor
from moec.targets.kernels.cuda.staged import Staged

ARRANGING = 256  # threads of a block that writes images
HALF = 4  # steps of 16 columns in half of a block

_BULK = r"""
#ifndef MOEC_BULK
#define MOEC_BULK
__device__ __forceinline__ void moec_barrier_init(unsigned int b, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(b), "r"(count) : "memory");
}
__device__ __forceinline__ void moec_cluster_ready() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("barrier.cluster.arrive.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
}
__device__ __forceinline__ void moec_barrier_expect(unsigned int b, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(b), "r"(bytes) : "memory");
}
__device__ __forceinline__ void moec_barrier_wait(unsigned int b, int parity) {
  asm volatile("{.reg .pred p; again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @p bra done; bra again; done: }"
    :: "r"(b), "r"(parity) : "memory");
}
__device__ __forceinline__ void moec_barrier_arrive(unsigned int b, int rank) {
  asm volatile("{.reg .b32 r; mapa.shared::cluster.u32 r, %0, %1; mbarrier.arrive.shared::cluster.b64 _, [r];}"
    :: "r"(b), "r"(rank) : "memory");
}
__device__ __forceinline__ void moec_bulk(unsigned int d, const void* p, int bytes, unsigned int b) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
    :: "r"(d), "l"(p), "r"(bytes), "r"(b) : "memory");
}
__device__ __forceinline__ void moec_bulk_all(unsigned int d, const void* p, int bytes, unsigned int b, int mask) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;"
    :: "r"(d), "l"(p), "r"(bytes), "r"(b), "h"((unsigned short)mask) : "memory");
}
#endif
"""


def cluster_ready() -> None:
    """Wait for all threads of the cluster; barriers that were set up are seen by all of it."""
    call("moec_cluster_ready", _BULK)


def wait(barrier: Expr, parity: Expr) -> None:
    """Wait until a barrier's phase of this parity is over."""
    call("moec_barrier_wait", _BULK, barrier, parity)


def expect(barrier: Expr, count: Expr) -> None:
    """So many bytes come before the phase is over."""
    call("moec_barrier_expect", _BULK, barrier, count)


def bulk(target: Expr, source: Expr, count: Expr, barrier: Expr, cluster: int) -> None:
    """Copy bytes to shared memory, of all blocks of a cluster; barriers there are told."""
    if cluster > 1:
        call("moec_bulk_all", _BULK, target, source, count, barrier, (1 << cluster) - 1)
    else:
        call("moec_bulk", _BULK, target, source, count, barrier)


def place(image: Buffer, tokens: int, tile: Expr, token: Expr, column: Expr) -> Expr:
    """The address of 8 columns of a token, the first a multiple of 8, in an image."""
    inner = column % BLOCK
    swizzled = (inner % 64 // 8 ^ token % 8) * 8
    return at(image, tile, column // BLOCK, inner // 64 * (tokens * 64) + token * 64 + swizzled)


class Images(Staged):
    """The ring of stages of a block of threads, filled from an image.

    Args:
        shape: a `Shape` with a cluster of 1, 2 or 4.
        memory: of the stages, uint32 [shape.words].
        barriers: uint32 [4 * stages].
        source: the image.
        rank: of the block in its cluster.
    """

    def __init__(self, shape: Any, memory: Buffer, barriers: Buffer, source: Buffer, thread: Expr, rank: Expr) -> None:
        self.shape, self._source, self._thread, self._rank = shape, source, thread, rank
        self._parts = shape.stages_of_block
        base = T.Bind(shared_address(at(memory, 0)))
        self._base = T.Bind((base + const(1023, "uint32")) // 1024 * 1024)
        self._full = T.Bind(shared_address(at(barriers, 0)))
        self._tile, self._rows, self._done = local(1, "int32"), local(1, "int32"), local(1, "int32")
        store(self._done, const(0, "int32"), 0)
        with when(thread == 0):
            for stage in range(shape.stages):
                call("moec_barrier_init", _BULK, self._barrier(stage, 0), 1)
                call("moec_barrier_init", _BULK, self._barrier(stage, 1), shape.threads // 32 * shape.cluster)
        cluster_ready()

    def _barrier(self, stage: Expr, which: int) -> Expr:
        """The address of `full` (0) or `empty` (1)."""
        offset = (stage + which * self.shape.stages) * 8
        return self._full + (const(offset, "uint32") if isinstance(offset, int) else T.cast(offset, "uint32"))

    def locate(self, tile: Expr, count: Expr) -> None:
        """Take up a tile of `count` tokens."""
        store(self._tile, tile, 0)
        store(self._rows, (count + 7) // 8 * 8, 0)

    def begin(self, blocks: int) -> None:
        """Ask for the first stages."""
        for part in range(min(self.shape.stages - 2, blocks * self._parts)):
            self.fetch(const(part, "int32"))

    def fetch(self, part: Expr) -> None:
        """Copy a block of columns, or a half of one, into its stage, once that is free."""
        shape, (stage, turn), cluster = self.shape, self._stage(part), self.shape.cluster
        if shape.halved:
            block, halves, sharing = part // 2, [part % 2], cluster
        else:
            block, halves, sharing = part, [self._rank * 2 // cluster] if cluster > 1 else [0, 1], max(cluster // 2, 1)
        with when(self._thread == 0):
            wait(self._barrier(stage, 1), (turn + 1) % 2)
            size, full = T.Bind(self._rows[0] * 128), T.Bind(self._barrier(stage, 0))
            expect(full, size if shape.halved else size * 2)
            for half in halves:
                inside = 0 if shape.halved else half * (shape.tokens * 128)
                target = self._base + T.cast(stage * shape.stage_bytes + inside, "uint32")
                source = half * (shape.tokens * 64)
                if sharing > 1:
                    self._share(target, block, source, full, sharing)
                else:
                    bulk(target, at(self._source, self._tile[0], block, source), size, full, cluster)

    def _share(self, target: Expr, block: Expr, source: Expr, full: Expr, blocks: int) -> None:
        """Copy this block's part of 64 columns, which so many blocks of the cluster share: some of the tokens, or none."""
        rows = self._rows[0]
        most = T.Bind((rows + (8 * blocks - 8)) // (8 * blocks) * 8)
        first = T.Bind(T.min(self._rank % blocks * most, rows))
        count = T.Bind(T.min(most, rows - first))
        with when(count > 0):
            place = target + T.cast(first * 128, "uint32")
            bulk(place, at(self._source, self._tile[0], block, source + first * 64), count * 128, full, self.shape.cluster)

    def step(self, block: Expr, blocks: int) -> Expr:
        return self._arrive(block * self._parts, blocks * self._parts)

    def part(self, block: Expr, blocks: int, step: int) -> Expr | None:
        return self._arrive(block * 2 + 1, blocks * 2) if self.shape.halved and step == HALF else None

    def _arrive(self, part: Expr, parts: int) -> Expr:
        """Wait for a stage, and ask for a later one."""
        ahead = self.shape.stages - 2
        with when(part + ahead < parts):
            self.fetch(part + ahead)
        stage, turn = self._stage(part)
        wait(self._barrier(stage, 0), turn % 2)
        return stage

    def passed(self, block: Expr, step: int) -> None:
        if step == 0:
            with when(block > 0):
                self.release(block * self._parts - 1)
        elif self.shape.halved and step == HALF:
            self.release(block * 2)

    def release(self, part: Expr) -> None:
        """This warp is done with a stage."""
        stage, _ = self._stage(part)
        # a lane for each block: several arrivals of one lane are a branch, at which ptxas gives up the overlap of products
        with when(self._thread % 32 < self.shape.cluster):
            call("moec_barrier_arrive", _BULK, self._barrier(stage, 1), self._thread % 32)

    def finish(self, blocks: int) -> None:
        self.release(const(blocks * self._parts - 1, "int32"))
        store(self._done, self._done[0] + blocks * self._parts, 0)

    def _stage(self, part: Expr) -> tuple[Expr, Expr]:
        """The stage of a block of columns, or of a half of one, and how often it was used before."""
        count = T.Bind(self._done[0] + part)
        return T.Bind(count % self.shape.stages), T.Bind(count // self.shape.stages)

    def operand(self, stage: Expr, step: int, index: int) -> Expr:
        assert index == 0
        half = 0 if self.shape.halved else step // HALF * self.shape.tokens * 128
        offset = stage * self.shape.stage_bytes + (half + step % HALF * 32)
        return descriptor(self._base + T.cast(offset, "uint32"))


def arrange_image_func(spec: Any) -> tirx.PrimFunc:
    """PrimFunc (x uint16 [1, T, D], order [S], tiles [most + 1, 4], image uint16 [most, D / 128, tokens * 128]) of a `PrefillSpec`."""
    threads, size, d = ARRANGING, spec.shape.tokens, spec.layout.d
    pieces = ceil_div(d, BLOCK) * (BLOCK // 8)  # of 16 bytes of a token
    each = threads // 16  # tokens of a block of threads at a time

    def body(operands: tuple[Any, ...], memory: Shared, part: Expr, tile: Expr, thread: Expr) -> None:
        x, order, tiles, image = operands
        del memory
        grid_wait()
        grid_launch()
        with when(tile < tiles[tiles.shape[0] - 1, 0]):
            first, count = T.Bind(tiles[tile, 1]), T.Bind(tiles[tile, 2])
            token = T.Bind(part * each + thread // 16)
            with when(token < count):
                row = T.Bind(order[first + token] // spec.top_k)
                with strided(thread % 16, pieces, 16) as piece:
                    column = T.Bind(piece * 8)
                    target = place(image, size, tile, token, column)
                    with T.If(column < d):
                        with T.Then():
                            move(target, at(x, 0, row, column))
                        with T.Else():
                            clear(target)

    return arranging(spec, each, body)


def arranging(spec: Any, each: int, body: Callable[..., None]) -> tirx.PrimFunc:
    """The kernel of x, order, tiles and the image that it writes, whose blocks of threads have `each` tokens of a tile."""

    def arguments() -> tuple[Any, ...]:
        tokens = spec.count()
        x = argument("x", (spec.shape.terms, tokens, spec.layout.d), "uint16")
        order, tiles = spec.sorted(tokens * spec.top_k)
        return x, order, tiles, spec.image("image", tokens * spec.top_k, spec.layout.d)

    def grid(operands: tuple[Any, ...]) -> list[Expr]:
        most = operands[2].shape[0] - 1
        return [ceil_div(spec.shape.tokens, each), most if isinstance(most, int) else T.cast(most, "int32")]

    return kernel("arrange", ARRANGING, arguments, grid, body)


_CLEAR = r"""
#ifndef MOEC_CLEAR
#define MOEC_CLEAR
__device__ __forceinline__ void moec_clear(void* d) { *(uint4*)d = make_uint4(0, 0, 0, 0); }
#endif
"""


def clear(target: Expr) -> None:
    """16 bytes of zeros."""
    call("moec_clear", _CLEAR, target)
