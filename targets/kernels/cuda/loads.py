"""Loads from memory into registers, as device functions: words that are read once, and numbers as float32."""

from __future__ import annotations

from collections.abc import Sequence

from moec.targets.kernels.cuda.emit import Expr
from moec.targets.kernels.cuda.intrinsics import call


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


_READ = r"""
#ifndef MOEC_READ
#define MOEC_READ
__device__ __forceinline__ void moec_read4(void* d, const void* p) {
  const uint4 v = *(const uint4*)p;
  unsigned int* r = (unsigned int*)d;
  r[0] = v.x; r[1] = v.y; r[2] = v.z; r[3] = v.w;
}
__device__ __forceinline__ void moec_read2(void* d, const void* p) {
  const uint2 v = *(const uint2*)p;
  unsigned int* r = (unsigned int*)d;
  r[0] = v.x; r[1] = v.y;
}
#endif
"""


def read_words(target: Expr, source: Expr, count: int = 4) -> None:
    """Read 2 or 4 words from memory of any kind into registers."""
    call(f"moec_read{count}", _READ, target, source)


_MOVE = r"""
#ifndef MOEC_MOVE
#define MOEC_MOVE
__device__ __forceinline__ void moec_move(void* d, const void* p) { *(uint4*)d = *(const uint4*)p; }
__device__ __forceinline__ void moec_write4(void* d, unsigned int a, unsigned int b, unsigned int c, unsigned int e) {
  *(uint4*)d = make_uint4(a, b, c, e);
}
#endif
"""


def move(target: Expr, source: Expr) -> None:
    """Copy 16 bytes between memories of any kind, both at multiples of 16."""
    call("moec_move", _MOVE, target, source)


def write_words(target: Expr, words: Sequence[Expr]) -> None:
    """Write 4 words to a multiple of 16 bytes at once."""
    call("moec_write4", _MOVE, target, *words)


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


_LOAD4 = r"""
#ifndef MOEC_LOAD4
#define MOEC_LOAD4
__device__ __forceinline__ void moec_load4_float32(float* d, const void* p) {
  const float4 v = *(const float4*)p;
  d[0] = v.x; d[1] = v.y; d[2] = v.z; d[3] = v.w;
}
__device__ __forceinline__ void moec_load4_bfloat16(float* d, const void* p) {
  const uint2 v = *(const uint2*)p;
  d[0] = __uint_as_float(v.x << 16); d[1] = __uint_as_float(v.x & 0xffff0000u);
  d[2] = __uint_as_float(v.y << 16); d[3] = __uint_as_float(v.y & 0xffff0000u);
}
#endif
"""


def load4(target: Expr, source: Expr, dtype: str) -> None:
    """Read four neighbours, float32 or bfloat16, as float32."""
    call(f"moec_load4_{dtype}", _LOAD4, target, source)
