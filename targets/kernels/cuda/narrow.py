"""Activations as E4M3 numbers and a scale of each token and block of 128 columns, in images as the tensor cores read them.

An image has for each tile of tokens its stages one after the other (see `image`): rows of 128 bytes, a token each, whose 16-byte pieces are
exchanged. Of 16 columns, byte 4 t + j is column 2 t, 8 + 2 t, 2 t + 1 or 9 + 2 t (j = 0 to 3): so the codes of `layout`, whose words
lanes have in that order, are operand A as they lie in memory. A scale is the largest magnitude over 448, as DeepSeek-V3 has it
(arXiv 2412.19437, "Fine-Grained Quantization").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from moec.targets.kernels.cuda.emit import Buffer, Expr, Shared, at, const, local, store, when
from moec.targets.kernels.cuda.image import ARRANGING, Images, arranging, bulk, expect, wait
from moec.targets.kernels.cuda.intrinsics import call, grid_launch, grid_wait
from moec.targets.kernels.cuda.layout import BLOCK, ceil_div
from moec.targets.kernels.cuda.loads import read_words, write_words
from moec.targets.kernels.cuda.matrix import descriptor
from moec.targets.kernels.cuda.warp import sync_warp

COLUMNS = 16
"""Columns of a lane: those of a block are a lane's of 8 that follow each other."""

LANES = BLOCK // COLUMNS

_NARROW = r"""
#ifndef MOEC_NARROW
#define MOEC_NARROW
__device__ __forceinline__ unsigned int moec_e4m3_of(float low, float high) {
  unsigned short d;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(d) : "f"(high), "f"(low));
  return d;
}
__device__ __forceinline__ float moec_narrow(unsigned int* d, const unsigned int* v) {
  float x[16], most = 0.f;
  #pragma unroll
  for (int i = 0; i < 8; ++i) { x[2 * i] = __uint_as_float(v[i] << 16); x[2 * i + 1] = __uint_as_float(v[i] & 0xffff0000u); }
  #pragma unroll
  for (int i = 0; i < 16; ++i) most = fmaxf(most, fabsf(x[i]));
  #pragma unroll
  for (int i = 1; i < 8; i *= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, i));
  const float factor = most > 0.f ? __fdividef(448.f, most) : 0.f;
  #pragma unroll
  for (int t = 0; t < 4; ++t)
    d[t] = moec_e4m3_of(x[2 * t] * factor, x[2 * t + 8] * factor) | moec_e4m3_of(x[2 * t + 1] * factor, x[2 * t + 9] * factor) << 16;
  return most * (1.f / 448.f);
}
#endif
"""


def narrow(words: Buffer, values: Buffer) -> Expr:
    """The scale of a block of which this lane has 16 columns, bfloat16 in uint32 [8]; they become E4M3 in uint32 [4].

    All lanes of a warp call it, of which 8 that follow each other have a block.
    """
    return T.Bind(call("moec_narrow", _NARROW, at(words, 0), at(values, 0), result="float32"))


@dataclass(frozen=True)
class NarrowImage:
    """An image as parameters: uint8 [tiles, blocks of 128 columns, tokens * 128] and float32 [tiles, blocks, tokens]."""

    data: Buffer
    scale: Buffer

    def write(self, tile: Expr, block: Expr, token: Expr, lane: Expr, words: Buffer, scale: Expr) -> None:
        """Write a lane's 16 columns of a token, and the scale."""
        place = token * BLOCK + (lane ^ token % 8) * COLUMNS
        write_words(at(self.data, tile, block, place), [words[i] for i in range(4)])
        with when(lane == 0):
            store(self.scale, scale, tile, block, token)


class NarrowImages(Images):
    """The ring of stages of a block of threads, filled from such an image; scales lie behind all the stages."""

    def locate(self, tile: Expr, count: Expr) -> None:
        store(self._tile, tile, 0)
        store(self._rows, (count + 15) // 16 * 16, 0)

    def fetch(self, block: Expr) -> None:
        shape, (stage, turn), image = self.shape, self._stage(block), self._source
        with when(self._thread == 0):
            wait(self._barrier(stage, 1), (turn + 1) % 2)
            rows, full = T.Bind(self._rows[0] // shape.cluster), T.Bind(self._barrier(stage, 0))
            expect(full, self._rows[0] * (BLOCK + 4))
            first = T.Bind(self._rank * rows) if shape.cluster == 2 else const(0, "int32")
            parts = [(self._place(stage), image.data, BLOCK), (self._scale_place(stage), image.scale, 4)]
            for target, source, size in parts:
                index = first * size if source is image.data else first
                bulk(target + T.cast(first * size, "uint32"), at(source, self._tile[0], block, index), rows * size, full, shape.cluster)

    def release(self, block: Expr) -> None:
        sync_warp()  # all lanes have read their scales
        super().release(block)

    def _place(self, stage: Expr) -> Expr:
        return self._base + T.cast(stage * self.shape.data_bytes, "uint32")

    def _scale_place(self, stage: Expr) -> Expr:
        return self._base + T.cast(self.shape.stages * self.shape.data_bytes + stage * (4 * self.shape.tokens), "uint32")

    def operand(self, stage: Expr, step: int, index: int) -> Expr:
        """The descriptor of 32 columns of a stage, of tokens from `index` on, a multiple of 8."""
        return descriptor(self._place(stage) + const(index * BLOCK + step * 32, "uint32"))

    def scales(self, target: Buffer, stage: Expr, token: Expr) -> None:
        """The scales of two tokens that follow each other, the first an even one, of the block in a stage."""
        call("moec_shared_pair", _PAIR, at(target, 0), self._scale_place(stage) + T.cast(token * 4, "uint32"))


_PAIR = r"""
#ifndef MOEC_SHARED_PAIR
#define MOEC_SHARED_PAIR
__device__ __forceinline__ void moec_shared_pair(float* d, unsigned int p) {
  asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(d[0]), "=f"(d[1]) : "r"(p) : "memory");
}
#endif
"""


def arrange_narrow_func(spec: Any) -> tirx.PrimFunc:
    """PrimFunc (x uint16 [1, T, D], order [S], tiles [most + 1, 4], image, its scales) of a `PrefillSpec`: bfloat16 tokens, by tiles."""
    d = spec.layout.d
    blocks, together = ceil_div(d, BLOCK), 2  # blocks of a token that its lanes have at a time
    each = ARRANGING // (together * LANES)

    def body(operands: tuple[Any, ...], memory: Shared, part: Expr, tile: Expr, thread: Expr) -> None:
        x, order, tiles, image = operands
        del memory
        values, words = local(COLUMNS // 2, "uint32"), local(4, "uint32")
        grid_wait()
        grid_launch()
        with when(tile < tiles[tiles.shape[0] - 1, 0]):
            first, count = T.Bind(tiles[tile, 1]), T.Bind(tiles[tile, 2])
            token, lane = T.Bind(part * each + thread // (together * LANES)), T.Bind(thread % LANES)
            row = T.Bind(order[first + T.min(token, count - 1)] // spec.top_k)
            with T.serial(ceil_div(blocks, together)) as i:
                block = T.Bind(i * together + thread // LANES % together)
                for half in range(2):
                    column = T.Bind(block * BLOCK + lane * COLUMNS + half * 8)
                    for word in range(4):
                        store(values, const(0, "uint32"), 4 * half + word)
                    with when(column < d):
                        read_words(at(values, 4 * half), at(x, 0, row, column))
                scale = narrow(words, values)
                with when(T.And(token < count, block < blocks)):
                    image.write(tile, block, token, lane, words, scale)

    return arranging(spec, each, body)
