"""The few device functions that the kernels call, as CUDA source: products on the tensor cores, their operands, and the next kernel.

Operands are pairs of bfloat16 in 32-bit registers. See also `loads`, `copies`, `dequantize`, `warp`, and `matrix` for the large products.
"""

from __future__ import annotations

from collections.abc import Sequence

from tvm.tirx.script import builder as T

from moec.targets.kernels.cuda.emit import Expr


def call(name: str, source: str, *args: Expr, result: str | None = None) -> Expr:
    """Call a device function; a statement unless it has a result."""
    if result is not None:
        return T.cuda.func_call(name, *args, source_code=source, return_type=result)
    T.evaluate(T.cuda.func_call(name, *args, source_code=source))
    return None


MMA = r"""
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
    call("moec_mma_first" if first else "moec_mma", MMA, d, a, b0, b1)


_SCALE = r"""
#ifndef MOEC_SCALE
#define MOEC_SCALE
__device__ __forceinline__ void moec_scale(unsigned int* a, unsigned int s0, unsigned int s1) {
  #pragma unroll
  for (int r = 0; r < 4; ++r)
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(a[r]) : "r"(a[r]), "r"((r & 1) ? s1 : s0), "r"(0x80008000u));
}
__device__ __forceinline__ void moec_scale_terms(unsigned int* a, unsigned int s0, unsigned int s1, unsigned int t0, unsigned int t1) {
  #pragma unroll
  for (int r = 0; r < 4; ++r) {
    unsigned int rest;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(rest) : "r"(a[r]), "r"((r & 1) ? t1 : t0), "r"(0x80008000u));
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(a[r]) : "r"(a[r]), "r"((r & 1) ? s1 : s0), "r"(rest));
  }
}
#endif
"""


def scale(a: Expr, factors: Sequence[Expr]) -> None:
    """Multiply an A fragment by the scales of its rows, rounding to bfloat16.

    Args:
        factors: for each row a pair of equal bfloat16; or that of the first row, of the second, and of both what is left of the scale, so
            that it is not rounded itself.
    """
    call("moec_scale" if len(factors) == 2 else "moec_scale_terms", _SCALE, a, *factors)


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


_WORD = r"""
#ifndef MOEC_WORD
#define MOEC_WORD
__device__ __forceinline__ void moec_store_word(void* p, unsigned int x) { *(unsigned int*)p = x; }
#endif
"""


def store_word(target: Expr, word: Expr) -> None:
    """Write a word, such as a pair of bfloat16, at an address of any type."""
    call("moec_store_word", _WORD, target, word)


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
