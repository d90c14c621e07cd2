"""Activations as the kernels read them: 16-bit integers in groups for integer weights, float32 for the others.

    scale = max |x| of the group / 32767,   q = round(x / scale),   sum = the sum of q over the group (for the zero points)

A row of `q` holds pairs of neighbours as int32 words and is padded so that rows do not all start in the same cache set.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm.tirx.script import builder as T

from moec.targets.kernels.cpu.emit import Buffer, Expr, Register, lane_type, splat, store, vector, workspace
from moec.targets.kernels.cpu.isa import Isa
from moec.targets.kernels.cpu.layout import LaneLayout, ceil_div

LIMIT = 32767
TINY = 0x0DA24260  # the bits of 1e-30, the least scale * 32767: keeps 1 / scale finite
PAD_WORDS = 16  # a cache line: rows of 4 KiB would share a set of the L1 cache
GROUPS = (128, 64, 32)  # 255 * 32767 * 128 < 2^31: a group's int32 sum cannot overflow


class Unrolled:
    """Memory that unrolled code reads.

    TVM derives the region that each access to memory of its own covers: seconds for unrolled code and a symbolic number of rows.
    It leaves views alone, but must see an access to the memory itself wherever it is in use, lest it gives the memory away; and
    LLVM takes the two for different memory, so that what reads a view must be in a parallel loop after the one that fills it.
    """

    def __init__(self, shape: tuple[Expr, ...], dtype: str) -> None:
        self.memory = workspace(shape, dtype)
        symbolic = not isinstance(shape[0], int)
        self._view = T.decl_buffer(shape, dtype, data=self.memory.data, layout=None) if symbolic else self.memory

    def load(self, row: Expr, column: Expr, *, first: bool) -> Expr:
        """An element; `first` in one access of every loop that reads."""
        return (self.memory if first else self._view)[row, column]


class Activations:
    """Rows [rows, K] of activations for the integer or floating-point weights of a layout, in memory of the function."""

    def __init__(self, layout: LaneLayout, isa: Isa, rows: Expr) -> None:
        self.layout, self.isa, self.rows = layout, isa, rows
        self.quantised = layout.integer is not None
        self.group = next(g for g in GROUPS if layout.group % g == 0) if self.quantised else layout.k
        self.groups = layout.padded_k // self.group
        if self.quantised:
            self.q = Unrolled((rows, layout.padded_k // 2 + PAD_WORDS), "int32")
            self.scale = Unrolled((rows, self.groups), "float32")
            self.sum = Unrolled((rows, self.groups), "int32")
        else:
            self.values = workspace((rows, ceil_div(layout.k, 16) * 16 + PAD_WORDS), "float32")

    def fill(self, x: Buffer, *, first: Expr = 0, rows: Expr | None = None, parallel: bool = True) -> None:
        """Convert rows of x float32 [.., at least K], from row `first` on."""
        count = self.rows if rows is None else rows
        with T.parallel(count) if parallel else T.serial(count) as row:
            if self.quantised:
                self._quantise_row(x, first + row, row)
            else:
                with T.serial(self.layout.k) as k:
                    store(self.values, x[first + row, k], row, k)

    def _quantise_row(self, x: Buffer, source: Expr, row: Expr) -> None:
        lanes = self.isa.lanes
        largest, total = Register("int32", lanes), Register("int32", lanes)
        whole = self.layout.k // self.group
        with T.serial(whole) as g:
            self._quantise_group(lambda i: vector(x, source, g * self.group + i, lanes=lanes), row, g, largest, total)
        if whole < self.groups:
            tail = T.alloc_buffer((self.group,), "float32", scope="global", layout=None)
        for group in range(whole, self.groups):  # one, or two where whole chunks need another
            with T.serial(self.group) as i:
                k = group * self.group + i
                store(tail, T.Select(k < self.layout.k, x[source, T.min(k, self.layout.k - 1)], T.float32(0)), i)
            self._quantise_group(lambda i: vector(tail, i, lanes=lanes), row, group, largest, total)

    def _quantise_group(self, load: Callable[[Expr], Expr], row: Expr, g: Expr, largest: Register, total: Register) -> None:
        """Quantise the group g of a row; `load(i)` is the vector at the i-th value of the group.

        Magnitudes are compared as integers, which orders them as numbers and puts NaN above all: it stays NaN in the scale.
        """
        lanes = self.isa.lanes
        floats, ints = lane_type("float32", lanes), lane_type("int32", lanes)
        largest.clear()
        total.clear()
        with T.serial(self.group // lanes) as i:
            magnitude = T.bitwise_and(T.reinterpret(ints, load(i * lanes)), splat(0x7FFFFFFF, "int32", lanes))
            largest.set(T.max(largest.get(), magnitude))
        bits = T.call_llvm_pure_intrin("int32", "llvm.vector.reduce.smax", largest.get())
        peak = T.Bind(T.reinterpret("float32", T.max(bits, TINY)))
        store(self.scale.memory, peak * T.float32(1 / LIMIT), row, g)
        inverse = T.Bind(T.float32(LIMIT) / peak)
        with T.serial(self.group // lanes) as i:
            rounded = T.call_llvm_pure_intrin(floats, "llvm.nearbyint", load(i * lanes) * splat(inverse, "float32", lanes))
            q = T.Bind(T.cast(rounded, ints))
            total.set(total.get() + q)
            pairs = T.reinterpret(lane_type("int32", lanes // 2), T.cast(q, lane_type("int16", lanes)))
            store(self.q.memory, pairs, row, (g * self.group + i * lanes) // 2, lanes=lanes // 2)
        store(self.sum.memory, T.call_llvm_pure_intrin("int32", "llvm.vector.reduce.add", total.get()), row, g)
