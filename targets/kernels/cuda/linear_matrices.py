"""The matrices of one format that `linear_tokens` multiplies with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tvm.tirx.script import builder as T

from moec.targets.kernels.cuda.cluster import cluster_read4
from moec.targets.kernels.cuda.copies import shared_address
from moec.targets.kernels.cuda.emit import Buffer, Expr, at, const, local, store, when
from moec.targets.kernels.cuda.intrinsics import call
from moec.targets.kernels.cuda.layout import ROWS, FragmentLayout, ceil_div
from moec.targets.kernels.cuda.linear_rows import Rows
from moec.targets.kernels.cuda.loads import load4
from moec.targets.kernels.cuda.matrices import SameFormat
from moec.targets.kernels.cuda.product import Product
from moec.targets.kernels.cuda.projections_matrix import pick
from moec.targets.kernels.cuda.registers import Registers
from moec.targets.kernels.cuda.stored import Place

if TYPE_CHECKING:
    from moec.targets.kernels.cuda.linear_tokens import TokensSpec

_STORE4 = r"""
#ifndef MOEC_STORE4
#define MOEC_STORE4
__device__ __forceinline__ void moec_store4(void* p, const float* v) {
  asm volatile("st.global.v4.f32 [%0], {%1,%2,%3,%4};" :: "l"(p), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]) : "memory");
}
#endif
"""


class _Picked(Product):
    """The arrays of the matrix that a warp has."""

    early = True

    def __init__(self, layout: FragmentLayout, buffers: dict[str, Buffer]) -> None:
        self.layout, self._buffers = layout, buffers


class Matrices(SameFormat):
    """Some matrices of a format, whose tiles of 16 rows follow each other: a warp has one of them.

    Args:
        members: which of the spec's matrices.
        arrays, biases, outs: the parameters, of all matrices.
    """

    def __init__(
        self, spec: TokensSpec, members: Sequence[int], arrays: Sequence[dict[str, Any]], biases: Sequence[Buffer | None],
        outs: Sequence[Buffer],
    ) -> None:  # fmt: skip
        super().__init__(spec, members, arrays, biases, outs)
        self.spec = spec
        self._tiles = sum(layout.tiles for layout in self._layouts)

    def _place(self, tile: Expr) -> tuple[Expr, Expr, Expr]:
        """Of a tile: its matrix, its index there, and the rows of that matrix."""
        which, first, rows, begin = const(0, "int32"), const(0, "int32"), const(self._layouts[0].n, "int32"), 0
        for n in range(1, len(self._layouts)):
            begin += self._layouts[n - 1].tiles
            later = tile >= begin
            which, first = T.Select(later, n, which), T.Select(later, begin, first)
            rows = T.Select(later, self._layouts[n].n, rows)
        return T.Bind(which), T.Bind(tile - first), T.Bind(rows)

    def begin(self, part: Expr, start: Expr, share: Expr, thread: Expr) -> None:
        """Ask for the first weights.

        Args:
            part: of the rows, number of `rows` each.
            start, share: the first block of columns, and how many.
        """
        self._thread, self._lane, self._warp = thread, T.Bind(thread % 32), T.Bind(thread // 32)
        self._first = T.Bind(part * (self.spec.rows // ROWS))
        which, tile, _ = self._place(T.Bind(T.min(self._first + self._warp, self._tiles - 1)))  # beyond the last it is that one again
        buffers = {
            name: pick(which, [arrays[name] for arrays in self._arrays], (1, *shape), dtype)
            for name, (shape, dtype) in self._layout.arrays().items()
        }
        self._product, self._tile, self._columns = _Picked(self._layout, buffers), tile, Place(0, 0, share, start)
        shape = self.spec.shape(self._layout)
        self._product.prepare(shape, thread, None, Registers(*self._product.sizes(shape)))
        self._product.begin(self._columns, [tile])

    def multiply(self, rows: Rows, sums: Buffer, columns: int, partial: Buffer) -> None:
        """partial[token, row] = the products of a block's columns, for so many tokens."""
        self._product.run(self._columns, [self._tile], rows, sums, columns)
        for n in range(columns // 8):
            for half in range(2):
                for c in range(2):
                    token, row = n * 8 + self._lane % 4 * 2 + c, self._warp * ROWS + half * 8 + self._lane // 4
                    store(partial, sums[4 * n + 2 * half + c], token, row)

    def finish(self, partial: Buffer, rank: Expr, first: Expr, count: Expr) -> None:
        """When all blocks of the cluster have their sums: add up those of some rows and tokens, and write them.

        Args:
            rank: of the block in its cluster.
            first, count: the first of the block's tokens, and how many there are.
        """
        spec = self.spec
        pieces = spec.rows // 4  # of 4 rows of a token
        for i in range(ceil_div(spec.tokens * pieces, spec.splits * spec.threads)):
            place = T.Bind((i * spec.splits + rank) * spec.threads + self._thread)
            token, row = T.Bind(place // pieces), T.Bind(place % pieces * 4)
            tile = T.Bind(self._first + row // ROWS)
            with when(T.And(token < count, tile < self._tiles)):
                parts = local(4 * spec.splits, "float32")
                if spec.splits == 1:
                    load4(at(parts, 0), at(partial, token, row), "float32")
                else:
                    address = T.Bind(shared_address(at(partial, token, row)))
                    for other in range(spec.splits):
                        cluster_read4(at(parts, 4 * other), address, other)
                values = local(4, "float32")
                for j in range(4):
                    store(values, sum((parts[4 * other + j] for other in range(1, spec.splits)), parts[j]), j)
                self._write(values, first + token, tile, row % ROWS)

    def _write(self, values: Buffer, token: Expr, tile: Expr, row: Expr) -> None:
        """Write four rows of a token, with their biases."""
        which, own, limit = self._place(tile)
        begin = T.Bind(own * ROWS + row)
        largest = max(layout.n for layout in self._layouts)
        out = pick(which, self._outs, (self._outs[0].shape[0] * largest,), "float32")
        for n, bias in enumerate(self._biases):
            if bias is not None:
                with when(which == n):
                    for j in range(4):
                        store(values, values[j] + bias[T.min(begin + j, self._layouts[n].n - 1)], j)
        place = T.Bind(token * limit + begin)
        if all(layout.n % 4 == 0 for layout in self._layouts):
            with when(begin < limit):
                call("moec_store4", _STORE4, at(out, place), at(values, 0))
            return
        for j in range(4):
            with when(begin + j < limit):
                store(out, values[j], place + j)
