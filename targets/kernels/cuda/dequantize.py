"""Weights as operand A of the tensor cores: bfloat16 from codes, E4M3 or values, in CUDA source.

A code becomes bfloat16 in the mantissa of a power of 2 (`packing`), from which that power and its zero point are subtracted, which is
exact. Scales are applied to the sums of a group in float32, so that integer weights meet the activations without any rounding.

E4M3 is exact as well: its 7 bits of exponent and mantissa are moved to where bfloat16 has them, subnormal numbers included, and multiplied
by 2^120, which is the difference of the biases, two numbers at a time. A word has the codes of two pairs: bytes 0 and 2, and bytes 1 and 3.
"""

from __future__ import annotations

from functools import lru_cache

from moec.targets.kernels.cuda.emit import Expr
from moec.targets.kernels.cuda.intrinsics import call
from moec.targets.kernels.cuda.layout import FragmentLayout
from moec.targets.kernels.cuda.packing import Field, packing

_CODES = r"""
#ifndef MOEC_CODES
#define MOEC_CODES
__device__ __forceinline__ unsigned int moec_pick(unsigned int x, unsigned int mask, unsigned int y) {  // (x & mask) | y
  unsigned int d;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(x), "r"(mask), "r"(y));
  return d;
}
__device__ __forceinline__ unsigned int moec_pick_not(unsigned int x, unsigned int mask, unsigned int y) {  // (~x & mask) | y
  unsigned int d;
  asm("lop3.b32 %0, %1, %2, %3, 0xAE;" : "=r"(d) : "r"(x), "r"(mask), "r"(y));
  return d;
}
__device__ __forceinline__ unsigned int moec_add(unsigned int x, unsigned int y) {
  unsigned int d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(x), "r"(0x3F803F80u), "r"(y));
  return d;
}
#endif
"""


@lru_cache(maxsize=256)
def _codes_source(name: str, bits: int, step: int, stride: int, middle: int | None) -> str:
    """Device function: the four A registers of a step from a lane's words, zero points subtracted.

    Args:
        stride: words of a row.
        middle: the zero point of all, None for z[2], those of the lane's rows.
    """
    lines = []
    for r in range(4):
        row, fields = r % 2, packing(bits)[2 * step + r // 2]
        zero = str(middle) if middle is not None else f"z{row}"

        def word(field: Field, row: int = row) -> str:
            text = f"w[{row * stride + field.word}]"
            return f"({text} >> {field.shift})" if field.shift > 0 else f"({text} << {-field.shift})" if field.shift else text

        if bits == 8:  # 128 + 7 bits, less 128, or 256 where the last bit is not set
            x = word(fields[0])
            made = f"moec_add(moec_pick({x}, 0x007F007Fu, 0x43004300u), moec_pick_not({x}, 0x00800080u, 0xC300C300u))"
            if middle is None:
                made = f"moec_add({made}, (__float_as_uint((float)(128 - (int){zero})) >> 16) * 0x10001u)"
        else:
            place = fields[0].at - fields[0].start
            magic = (0x4300 - (place << 7)) * 0x10001  # 2 ** (7 - place)
            made = f"0x{magic:08X}u"
            for field in fields:
                made = f"moec_pick({word(field)}, 0x{field.mask:08X}u, {made})"
            made = f"moec_add({made}, 0x{magic | 0x80008000:08X}u | (({zero}) << {place}) * 0x10001u)"
        lines.append(f"  a[{r}] = {made};")
    zeros = ", unsigned int z0, unsigned int z1" if middle is None else ""
    head = f"__device__ __forceinline__ void {name}(unsigned int* a, const unsigned int* w{zeros})"
    return f"{_CODES}{head} {{\n" + "\n".join(lines) + "\n}\n"


_VALUES = r"""
#ifndef MOEC_VALUES
#define MOEC_VALUES
__device__ __forceinline__ void moec_values(unsigned int* a, const unsigned int* w, int i) {
  #pragma unroll
  for (int r = 0; r < 4; ++r) a[r] = w[(i >> 1) * 8 + (r & 1) * 4 + (i & 1) * 2 + (r >> 1)];
}
#endif
"""


# moec_e4m3: the four A registers of step `i` from a lane's words; stride: words of a row.
_E4M3 = r"""
#ifndef MOEC_E4M3
#define MOEC_E4M3
__device__ __forceinline__ unsigned int moec_e4m3_pair(unsigned int x) {
  unsigned int d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;"
    : "=r"(d) : "r"((x & 0x80008000u) | ((x >> 4) & 0x07F007F0u)), "r"(0x7B807B80u), "r"(0x80008000u));
  return d;
}
__device__ __forceinline__ void moec_e4m3(unsigned int* a, const unsigned int* w, int i, int stride) {
  #pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int p = 2 * i + (r >> 1);
    const unsigned int x = w[(r & 1) * stride + p / 2];
    a[r] = moec_e4m3_pair((p & 1) ? x : x << 8);
  }
}
#endif
"""


def dequantize(layout: FragmentLayout, a: Expr, words: Expr, step: int, zeros: tuple[Expr, Expr], units: int = 1) -> None:
    """The A fragment [16, 16] of a step from the words that a lane holds of a block, or of a unit of it if the block has several."""
    if layout.coded is None:
        call("moec_values", _VALUES, a, words, step)
    elif layout.integer is None:
        call("moec_e4m3", _E4M3, a, words, step, layout.bits // units)
    else:
        integer = layout.integer
        middle, stride = integer.levels // 2 if integer.symmetric else None, integer.bits // units
        name = f"moec_codes{integer.bits}_{'z' if middle is None else middle}_{step}_{stride}"
        source = _codes_source(name, integer.bits, step, stride, middle)
        call(name, source, a, words, *(zeros if middle is None else ()))
