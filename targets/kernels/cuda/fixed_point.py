"""Products of integer codes with activations in fixed point, exact on the tensor cores: what `projections` multiplies by.

A block of 128 activations becomes integers of 24 bits, of which the largest in magnitude is 127 * 2^16, in three terms of a byte each:
q = 65536 q0 + 256 q1 + q2, which are the bytes of q + 0x8080, the lower two less 0x80. Each term is a column of B in `mma.m16n8k32` of
unsigned by signed bytes, whose int32 sums are exact. Against float32 activations the error is 2^-24 of the block's largest. Four codes
take one to two instructions to become the bytes of an A register, where two of bfloat16 take four, and there are half as many products.

A lane has 16 pairs of neighbouring columns of each of its rows: pair p is at columns 8 p + 2 t and 8 p + 2 t + 1 (`layout.py`). Register
r < 8 of a row has the pairs p and p + d as bytes (p, p + d, p, p + d), the first two of the even columns, with p = r // d * 2 d + r % d.
The distance d is the one at which codes that lie side by side in a word are a byte apart, 8 over their bits.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from tvm.tirx.script import builder as T

from moec.targets.kernels.cuda.emit import Expr
from moec.targets.kernels.cuda.intrinsics import call
from moec.targets.kernels.cuda.layout import BLOCK
from moec.targets.kernels.cuda.packing import Field, packing

TERMS = 3
STEPS = 4  # products of 32 columns in a block
REGISTERS = 2 * STEPS  # of a row
SCALE = TERMS * 4 * REGISTERS  # where a staged block has its scale, after the words [term, t, r]
WORDS = SCALE + 4  # of a staged block

_STAGE = r"""
#ifndef MOEC_FIXED
#define MOEC_FIXED
__device__ __forceinline__ void moec_fixed(unsigned int* to, const float* v, int lane) {
  unsigned int most = 0x0da24260u;  // 1e-30; as integers the order is that of magnitudes, NaN the largest
  #pragma unroll
  for (int i = 0; i < 4; ++i) most = max(most, __float_as_uint(v[i]) & 0x7fffffffu);
  most = __reduce_max_sync(0xffffffffu, most);
  const float inverse = __fdividef(8323072.f, __uint_as_float(most));
  unsigned int q[4];
  #pragma unroll
  for (int i = 0; i < 4; ++i) q[i] = (unsigned int)__float2int_rn(v[i] * inverse) + 0x8080u;
  const unsigned int even = __byte_perm(q[0], q[2], 0x5140), odd = __byte_perm(q[1], q[3], 0x5140);
  unsigned int* const own = to + lane % 4 * 8 + lane / 4;
  own[64] = __byte_perm(even, odd, 0x5410) ^ 0x80808080u;
  own[32] = __byte_perm(even, odd, 0x7632) ^ 0x80808080u;
  own[0] = __byte_perm(__byte_perm(q[0], q[2], 0x0062), __byte_perm(q[1], q[3], 0x0062), 0x5410);
  if (lane == 0) to[96] = __float_as_uint(__uint_as_float(most) * (1.f / 8323072.f));
}
#endif
"""


def stage(to: Expr, values: Expr, lane: Expr) -> None:
    """Stage a block by a warp: `values` are the pairs p and p + d of register `lane / 4` for t = `lane % 4`, four float32."""
    call("moec_fixed", _STAGE, to, values, lane)


_MMA = r"""
#ifndef MOEC_IMMA
#define MOEC_IMMA
__device__ __forceinline__ void moec_imma(int* d, const unsigned int* a, unsigned int b0, unsigned int b1) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
    : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#endif
"""


def product(d: Expr, a: Expr, b0: Expr, b1: Expr) -> None:
    """d[4] += A[16, 32] B[32, 8] on a warp's fragments: int32, bytes without and with a sign."""
    call("moec_imma", _MMA, d, a, b0, b1)


def distance(bits: int) -> int:
    """Between the two pairs that share a register."""
    return 8 // bits if _side_by_side(bits) else 1


def _side_by_side(bits: int) -> bool:
    """Whether a byte has whole codes, in their order."""
    return bits in (1, 2, 4, 8)


def pair(register: Any, bits: int) -> Any:
    """The first pair of a register."""
    d = distance(bits)
    return register // d * (2 * d) + register % d


@cache
def _codes_source(bits: int, step: int) -> str:
    """Device function: the four A registers of a step from a lane's words."""
    lines = []
    for i in range(4):
        first = pair(2 * step + i // 2, bits)
        if _side_by_side(bits):
            (field,) = packing(bits)[first]
            found = f"{_shifted(f'w[{i % 2 * bits + field.word}]', field.shift + field.at)} & 0x{((1 << bits) - 1) * 0x01010101:08x}u"
        else:
            pairs = enumerate((first, first + distance(bits)))
            found = " | ".join(_byte(f"w[{i % 2 * bits + field.word}]", field, 8 * n) for n, p in pairs for field in packing(bits)[p])
        lines.append(f"  a[{i}] = {found};\n")
    return f"__device__ __forceinline__ void moec_bytes{bits}_{step}(unsigned int* a, const unsigned int* w) {{\n{''.join(lines)}}}\n"


def _byte(word: str, field: Field, to: int) -> str:
    """Bits of a pair of codes at their place in bytes of the low and of the high half."""
    mask = field.mask >> field.at << field.shift + field.at
    return _shifted(f"({word} & 0x{mask:08x}u)", field.shift + field.at - field.start - to)


def _shifted(word: str, right: int) -> str:
    return f"({word} >> {right})" if right >= 0 else f"({word} << {-right})"


def codes(bits: int, a: Expr, words: Expr, step: int) -> None:
    """The A fragment [16, 32] of a step, as codes from 0 on, from the words that a lane holds of a block."""
    call(f"moec_bytes{bits}_{step}", _codes_source(bits, step), a, words)


def group_steps(bits: int, groups: int) -> list[list[tuple[int, int, int]]]:
    """For each of a block's groups its products: (step, which bytes of the first B register are the group's, and of the second)."""
    d, pairs = distance(bits), BLOCK // groups // 8
    found: list[list[tuple[int, int, int]]] = []
    for group in range(groups):
        masks = []
        for register in range(REGISTERS):
            first = pair(register, bits)
            inside = [p // pairs == group for p in (first, first + d)]
            masks.append(0x00FF00FF * inside[0] + 0xFF00FF00 * inside[1])
        found.append([(n, masks[2 * n], masks[2 * n + 1]) for n in range(STEPS) if masks[2 * n] or masks[2 * n + 1]])
    return found


def only(register: Expr, mask: int) -> Expr:
    """Some bytes of a register."""
    return register if mask == 0xFFFFFFFF else T.bitwise_and(register, T.uint32(mask))


def weight_of_column(t: Expr, which: int) -> Expr:
    """What a lane's sum of its first or second column of B counts, in units of a staged block's scale."""
    one = T.float32(0 if which else 1)
    return T.Select(t == 0, T.float32(256 if which else 65536), T.Select(t == 1, one, T.float32(0)))
