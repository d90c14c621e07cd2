"""E4M3 as bfloat16, exactly, in CUDA source.

The 7 bits of exponent and mantissa are moved to where bfloat16 has them, subnormal numbers included, and multiplied by 2^120, which is the
difference of the biases, two numbers at a time. A word has the codes of two pairs: bytes 0 and 2, and bytes 1 and 3.
"""

from __future__ import annotations

E4M3 = r"""
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
"""`moec_e4m3`: the four A registers of step `i` from a lane's words; stride: words of a row."""
