"""The few device functions that the kernels call, as CUDA source: loads, products on the tensor cores, and codes to bfloat16.

Operands of the products are bfloat16 pairs in 32-bit registers. A code becomes bfloat16 in the mantissa of a power of 2 (`packing`), from
which that power and its zero point are subtracted, which is exact. Scales are applied to the sums of a group in float32, so that integer
weights meet the activations without any rounding. For E4M3 see `e4m3`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from tvm.tirx.script import builder as T

from moec.targets.kernels.cuda.e4m3 import E4M3
from moec.targets.kernels.cuda.layout import FragmentLayout
from moec.targets.kernels.cuda.packing import Field, packing

Expr = Any


def call(name: str, source: str, *args: Expr, result: str | None = None) -> Expr:
    """Call a device function; a statement unless it has a result."""
    if result is not None:
        return T.cuda.func_call(name, *args, source_code=source, return_type=result)
    T.evaluate(T.cuda.func_call(name, *args, source_code=source))
    return None


def load_words(target: Expr, source: Expr, count: int, early: bool = False) -> None:
    """Read 32-bit words that no one writes during the kernel and that are read once: 1, 2 or 4.

    Args:
        early: ask for them here, in front of the next `grid_wait`; otherwise the compiler may do so later.
    """
    vector = {1: "u32", 2: "v2.u32", 4: "v4.u32"}[count]
    outs = ",".join(f"%{i}" for i in range(count))
    registers = ",".join(f'"=r"(r[{i}])' for i in range(count))
    braces = f"{{{outs}}}" if count > 1 else outs
    name, kind, order = (f"moec_ask{count}", "", ' : "memory"') if early else (f"moec_load{count}", ".nc", "")
    body = (
        f"__device__ __forceinline__ void {name}(void* d, const void* p) {{\n"
        "  unsigned int* r = (unsigned int*)d;\n"
        f'  asm volatile("ld.global{kind}.L1::no_allocate.{vector} {braces}, [%{count}];" : {registers} : "l"(p){order});\n}}\n'
    )
    call(name, body, target, source)


_MMA = r"""
#ifndef MOEC_MMA
#define MOEC_MMA
__device__ __forceinline__ void moec_mma(float* d, const unsigned int* a, unsigned int b0, unsigned int b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
    : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void moec_mma_first(float* d, const unsigned int* a, unsigned int b0, unsigned int b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
    : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.f));
}
#endif
"""


def mma(d: Expr, a: Expr, b0: Expr, b1: Expr, first: bool = False) -> None:
    """d[4] += A[16, 16] B[16, 8] on a warp's fragments; where it is the first product, d is only written."""
    call("moec_mma_first" if first else "moec_mma", _MMA, d, a, b0, b1)


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


def dequantize(layout: FragmentLayout, a: Expr, words: Expr, step: int, zeros: tuple[Expr, Expr], units: int = 1) -> None:
    """The A fragment [16, 16] of a step from the words that a lane holds of a block, or of a unit of it if the block has several."""
    if layout.coded is None:
        call("moec_values", _VALUES, a, words, step)
    elif layout.integer is None:
        call("moec_e4m3", E4M3, a, words, step, layout.bits // units)
    else:
        integer = layout.integer
        middle, stride = integer.levels // 2 if integer.symmetric else None, integer.bits // units
        name = f"moec_codes{integer.bits}_{'z' if middle is None else middle}_{step}_{stride}"
        source = _codes_source(name, integer.bits, step, stride, middle)
        call(name, source, a, words, *(zeros if middle is None else ()))


SPLIT = r"""
#ifndef MOEC_SPLIT
#define MOEC_SPLIT
__device__ __forceinline__ unsigned int moec_pack(float x, float y) {
  unsigned int d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(y), "f"(x));
  return d;
}
__device__ __forceinline__ unsigned int moec_term(float x, float y, int term) {
  unsigned int d = moec_pack(x, y);
  for (int i = 0; i < term; ++i) {
    x -= __uint_as_float(d << 16); y -= __uint_as_float(d & 0xffff0000u);
    d = moec_pack(x, y);
  }
  return d;
}
#endif
"""


def term(x: Expr, y: Expr, index: int) -> Expr:
    """The pair of bfloat16 terms number `index` of two float32: x = term 0 + term 1 + ..., each 8 bits more."""
    return call("moec_term", SPLIT, x, y, index, result="uint32")


_WAIT = r"""
#ifndef MOEC_WAIT
#define MOEC_WAIT
__device__ __forceinline__ void moec_grid_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void moec_grid_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
#endif
"""


def grid_wait() -> None:
    """Wait for the kernel before this one, which may still run (programmatic dependent launch)."""
    call("moec_grid_wait", _WAIT)


def grid_launch() -> None:
    """Let the next kernel begin."""
    call("moec_grid_launch", _WAIT)


_HALF2 = r"""
#ifndef MOEC_HALF2
#define MOEC_HALF2
__device__ __forceinline__ void moec_half2(float* d, unsigned int x) {
  float a, b;
  asm("{.reg .f16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}" : "=f"(a), "=f"(b) : "r"(x));
  d[0] = a; d[1] = b;
}
#endif
"""


def widen(target: Expr, pair: Expr) -> None:
    """Two float32 from a pair of float16 in a word."""
    call("moec_half2", _HALF2, target, pair)


_READ = r"""
#ifndef MOEC_READ
#define MOEC_READ
__device__ __forceinline__ void moec_read4(void* d, const void* p) {
  const uint4 v = *(const uint4*)p;
  unsigned int* r = (unsigned int*)d;
  r[0] = v.x; r[1] = v.y; r[2] = v.z; r[3] = v.w;
}
#endif
"""


def read_words(target: Expr, source: Expr) -> None:
    """Read 16 bytes from memory of any kind."""
    call("moec_read4", _READ, target, source)


_PAIR = r"""
#ifndef MOEC_PAIR
#define MOEC_PAIR
__device__ __forceinline__ void moec_pair_float32(float* d, const void* p) {
  const float2 v = *(const float2*)p;
  d[0] = v.x; d[1] = v.y;
}
__device__ __forceinline__ void moec_pair_bfloat16(float* d, const void* p) {
  const unsigned int v = *(const unsigned int*)p;
  d[0] = __uint_as_float(v << 16); d[1] = __uint_as_float(v & 0xffff0000u);
}
#endif
"""


def load_pair(target: Expr, source: Expr, dtype: str) -> None:
    """Read two neighbours, float32 or bfloat16, as float32."""
    call(f"moec_pair_{dtype}", _PAIR, target, source)
