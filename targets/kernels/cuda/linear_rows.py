"""The rows that `linear_tokens` multiplies with: float32 in memory, in shared memory terms of bfloat16, as the tensor cores read them."""

from __future__ import annotations

from tvm.tirx.script import builder as T

from moec.targets.kernels.cuda.copies import shared_address
from moec.targets.kernels.cuda.emit import Buffer, Expr, at, const, local, store, sync, when
from moec.targets.kernels.cuda.gathered import PIECES
from moec.targets.kernels.cuda.intrinsics import SPLIT, call
from moec.targets.kernels.cuda.layout import BLOCK, ceil_div
from moec.targets.kernels.cuda.loads import load4
from moec.targets.kernels.cuda.matrix import descriptor, proxy_fence, wgmma_wait
from moec.targets.kernels.cuda.shape import Shape
from moec.targets.kernels.cuda.staged import Staged

MOST_HELD = 8
"""Pieces of 8 columns that a thread asks for before it writes the first of them: 64 registers, or half of that beside sums."""

_TERMS = (
    SPLIT
    + r"""
#ifndef MOEC_STORE_TERMS
#define MOEC_STORE_TERMS
__device__ __forceinline__ void moec_store_terms(void* d, int stride, const float* v) {
  unsigned int high[4], low[4];
  #pragma unroll
  for (int i = 0; i < 4; ++i) {
    high[i] = moec_pack(v[2 * i], v[2 * i + 1]);
    low[i] = moec_pack(v[2 * i] - __uint_as_float(high[i] << 16), v[2 * i + 1] - __uint_as_float(high[i] & 0xffff0000u));
  }
  *(uint4*)d = make_uint4(high[0], high[1], high[2], high[3]);
  *(uint4*)((char*)d + stride) = make_uint4(low[0], low[1], low[2], low[3]);
}
#endif
"""
)


class Rows(Staged):
    """Stages of 128 columns each, filled all at once, or in rounds of as many as there are.

    Args:
        shape: its `tokens` are staged, in `stages` stages.
        threads: of the block.
        memory: uint32 [shape.words].
        source: float32 [T, k].
        share: blocks of columns that the thread block has at most.
    """

    def __init__(self, shape: Shape, threads: int, memory: Buffer, source: Buffer, share: int, thread: Expr) -> None:
        assert shape.terms == 2
        self.shape, self._memory, self._source, self._share = shape, memory, source, share
        self._piece, self._first, self._per = T.Bind(thread % PIECES), T.Bind(thread // PIECES), threads // PIECES
        base = T.Bind(shared_address(at(memory, 0)))
        self._base = T.Bind((base + const(1023, "uint32")) // 1024 * 1024)
        self._skipped = T.Bind(T.cast(self._base - base, "int32") // 4)

    def locate(self, first: Expr, count: Expr, start: Expr, blocks: Expr) -> None:
        """Of the tile: its first token, and how many there are; and the first block of columns, and how many of those.

        What lies in the stages for tokens beyond is multiplied too, but nobody uses what that gives.
        """
        self._token, self._count, self._start, self._blocks = first, count, start, blocks

    @property
    def _whole(self) -> bool:
        return bool(self._share <= self.shape.stages)

    def begin(self) -> None:
        """Fill the stages, where all blocks have one."""
        if self._whole:
            self._fill(0, self._share)

    def step(self, block: Expr, _: Expr) -> Expr:
        """A block's stage. The first block of a round waits until all are done with the last round, and fills the stages."""
        if self._whole:
            return block
        stages = self.shape.stages
        with when(block % stages == 0):
            wgmma_wait(0)
            sync()
            self._fill(block, stages)
        return T.Bind(block % stages)

    def _fill(self, first: Expr, count: int) -> None:
        """Write so many blocks from the first on, as far as there are."""
        turns = ceil_div(self.shape.tokens, self._per)
        items = [(stage, turn) for stage in range(count) for turn in range(turns)]
        held = MOST_HELD if self._whole else MOST_HELD // 2
        for done in range(0, len(items), held):
            some = items[done : done + held]
            values = local(8 * len(some), "float32")
            for i, item in enumerate(some):
                self._load(values, 8 * i, first, *item)
            for i, (stage, turn) in enumerate(some):
                token = T.Bind(self._first + turn * self._per)
                with when(token < self._count):
                    call("moec_store_terms", _TERMS, self._place(stage, token), self.shape.tokens * 256, at(values, 8 * i))
        proxy_fence()
        sync()

    def _load(self, values: Buffer, index: int, first: Expr, stage: int, turn: int) -> None:
        """Ask for 8 columns of a token, zeros beyond the row's end."""
        token, block = T.Bind(self._first + turn * self._per), first + stage
        column = T.Bind((self._start + block) * BLOCK + self._piece * 8)
        for i in range(8):
            store(values, T.float32(0), index + i)
        with when(T.And(token < self._count, T.And(block < self._blocks, column < self._source.shape[1]))):
            for i in (0, 4):
                load4(at(values, index + i), at(self._source, self._token + token, column + i), "float32")

    def _place(self, stage: int, token: Expr) -> Expr:
        """Where the first term of 8 columns goes: 16 bytes."""
        tokens, swizzled = self.shape.tokens, (self._piece % 8 ^ token % 8) * 4
        return at(
            self._memory, self._skipped + stage * self.shape.stage_bytes // 4 + self._piece // 8 * (tokens * 32) + token * 32 + swizzled
        )

    def operand(self, stage: Expr, step: int, index: int) -> Expr:
        """The descriptor of 16 columns of a stage."""
        half = step // 4 * self.shape.tokens * 128 + step % 4 * 32
        offset = stage * self.shape.stage_bytes + index * self.shape.tokens * 256 + half
        return descriptor(self._base + T.cast(offset, "uint32"))
