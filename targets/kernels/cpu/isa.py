"""What the kernels need to know of an instruction set, and the one instruction that differs: the integer dot product.

Another instruction set is one `Isa` value and, where it has a dot product of 16-bit pairs, one entry of `DOTS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.target import Target, codegen
from tvm.tirx.script import builder as T

Expr = Any  # a TIR expression; the stubs have no common type for those that T builds


@dataclass(frozen=True)
class Isa:
    """Vector width, register file and dot product of a target."""

    name: str
    vector_bits: int
    row_tiles: int  # tiles of 16 rows that a register tile spans
    tokens: int  # tokens that a register tile spans, a power of two
    dot: str  # key of DOTS
    fused: bool = True  # has fused multiply-add in float32 (LLVM would call libm for it)

    @property
    def lanes(self) -> int:
        """32-bit lanes of a vector."""
        return self.vector_bits // 32

    @staticmethod
    def of(target: Target) -> Isa:
        """The instruction set of a TVM llvm target."""
        features = set(codegen.llvm_get_cpu_features(target))
        return next(isa for required, isa in ISAS if required <= features)


ISAS: list[tuple[set[str], Isa]] = [  # the first whose features the target has
    ({"avx512bw", "avx512vnni"}, Isa("avx512_vnni", 512, row_tiles=2, tokens=8, dot="vpdpwssd")),
    ({"avx512bw"}, Isa("avx512", 512, row_tiles=2, tokens=8, dot="vpmaddwd")),
    ({"avx2", "fma", "avxvnni"}, Isa("avx_vnni", 256, row_tiles=1, tokens=4, dot="vpdpwssd")),
    ({"avx2", "fma"}, Isa("avx2", 256, row_tiles=1, tokens=4, dot="vpmaddwd")),
    ({"neon"}, Isa("neon", 128, row_tiles=1, tokens=4, dot="portable")),
    (set(), Isa("generic", 128, row_tiles=1, tokens=2, dot="portable", fused=False)),
]


def _vpdpwssd(accumulator: Expr, a: Expr, b: Expr, lanes: int) -> Expr:
    name = f"llvm.x86.avx512.vpdpwssd.{lanes * 32}"
    a, b = (T.reinterpret(f"int16x{2 * lanes}", x) for x in (a, b))
    return T.call_llvm_pure_intrin(f"int32x{lanes}", name, accumulator, a, b)


def _vpmaddwd(accumulator: Expr, a: Expr, b: Expr, lanes: int) -> Expr:
    name = {16: "llvm.x86.avx512.pmaddw.d.512", 8: "llvm.x86.avx2.pmadd.wd"}[lanes]
    a, b = (T.reinterpret(f"int16x{2 * lanes}", x) for x in (a, b))
    return accumulator + T.call_llvm_pure_intrin(f"int32x{lanes}", name, a, b)


def _portable(accumulator: Expr, a: Expr, b: Expr, lanes: int) -> Expr:
    """In 32-bit arithmetic; `a` holds codes, which are not negative."""
    low, sixteen = T.broadcast(T.int32(0xFFFF), lanes), T.broadcast(T.int32(16), lanes)
    b_low = T.shift_right(T.shift_left(b, sixteen), sixteen)
    return accumulator + T.bitwise_and(a, low) * b_low + T.shift_right(a, sixteen) * T.shift_right(b, sixteen)


DOTS: dict[str, Callable[[Expr, Expr, Expr, int], Expr]] = {
    "vpdpwssd": _vpdpwssd,
    "vpmaddwd": _vpmaddwd,
    "portable": _portable,
}
"""accumulator [lanes] + the dot products of `a` and `b`, lane by lane: vectors int32 that hold two 16-bit integers a lane."""


def multiply_add(isa: Isa, a: Expr, b: Expr, c: Expr) -> Expr:
    """a * b + c on vectors of float32."""
    return T.call_llvm_pure_intrin(f"float32x{isa.lanes}", "llvm.fma", a, b, c) if isa.fused else a * b + c
