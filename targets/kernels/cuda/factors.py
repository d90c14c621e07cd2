"""Scales in the weights instead of on the sums: factors of bfloat16, and A fragments multiplied by them."""

from __future__ import annotations

from moec.targets.kernels.cuda.intrinsics import Expr, call

_SCALE = r"""
#ifndef MOEC_SCALE
#define MOEC_SCALE
__device__ __forceinline__ void moec_scale(unsigned int* a, unsigned int s0, unsigned int s1) {
  #pragma unroll
  for (int r = 0; r < 4; ++r)
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(a[r]) : "r"(a[r]), "r"((r & 1) ? s1 : s0), "r"(0x80008000u));
}
__device__ __forceinline__ void moec_factors(unsigned int* d, unsigned int x) {
  float a, b;
  asm("{.reg .f16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}" : "=f"(a), "=f"(b) : "r"(x));
  asm("cvt.rn.bf16x2.f32 %0, %1, %1;" : "=r"(d[0]) : "f"(a));
  asm("cvt.rn.bf16x2.f32 %0, %1, %1;" : "=r"(d[1]) : "f"(b));
}
#endif
"""


def bf16_factors(target: Expr, pair: Expr) -> None:
    """The scales of two rows, each as a pair of equal bfloat16."""
    call("moec_factors", _SCALE, target, pair)


def scale(a: Expr, factors: tuple[Expr, Expr]) -> None:
    """Multiply an A fragment by the scales of its rows, rounding to bfloat16."""
    call("moec_scale", _SCALE, a, *factors)
