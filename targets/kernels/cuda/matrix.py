"""Device functions of the large products, with the weights in registers and the activations in shared memory.

Where there is `wgmma`, a warpgroup multiplies at once and asynchronously; elsewhere its warps do by `mma`, whose fragments are the same.

A stage of activations [N tokens, 128] bfloat16 lies as two halves of 64 columns, rows of 128 bytes whose 16-byte pieces are exchanged
(piece i of row r is at i ^ (r mod 8)), which is the tensor cores' 128-byte swizzle (PTX ISA, "Asynchronous warpgroup-level matrix shared
memory layout").
"""

from __future__ import annotations

from functools import lru_cache

from moec.targets.kernels.cuda.emit import Expr
from moec.targets.kernels.cuda.intrinsics import MMA, call

_HOPPER = "#ifdef __CUDA_ARCH_FEAT_SM90_ALL"
"""There is `wgmma` (sm_90a); elsewhere products are those of warps."""

# B from shared memory, and the products of a warp: a lane says where 16 bytes of a token are, of which all get a part.
_WARP = r"""
#ifndef MOEC_WARP_PRODUCT
#define MOEC_WARP_PRODUCT
__device__ __forceinline__ void moec_read_matrix4(unsigned int* r, unsigned int p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
    : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(p) : "memory");
}
template <int COLUMNS, int TILES, int STRIDE>
__device__ __forceinline__ void moec_warp_product(float* d, const unsigned int* a, unsigned long long b, int add) {
  const unsigned int first = (unsigned int)(b & 0x3fff) << 4, lane = threadIdx.x & 31;
  const unsigned int piece = (first % 128 / 16 + lane / 8 % 2) ^ (lane % 8);
  const unsigned int own = first / 128 * 128 + (lane / 16 * 8 + lane % 8) * 128 + piece * 16;
  if (!add) {
    #pragma unroll
    for (int m = 0; m < TILES; ++m)
      #pragma unroll
      for (int i = 0; i < COLUMNS / 2; ++i) d[m * STRIDE + i] = 0.f;
  }
  #pragma unroll
  for (int n = 0; n < COLUMNS / 8; n += 2) {
    unsigned int r[4];
    moec_read_matrix4(r, COLUMNS / 8 - n > 1 || lane < 16 ? own + n * 1024 : own - 1024 + n * 1024);
    #pragma unroll
    for (int i = 0; i < 2; ++i)
      if (n + i < COLUMNS / 8) {
        #pragma unroll
        for (int m = 0; m < TILES; ++m) moec_mma(d + m * STRIDE + 4 * (n + i), a + 4 * m, r[2 * i], r[2 * i + 1]);
      }
  }
}
#endif
"""


@lru_cache(maxsize=32)
def _wgmma(name: str, columns: int, kind: str, rest: str) -> str:
    count = columns // 2
    outs = ", ".join(f"%{i}" for i in range(count))
    registers = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    a = ", ".join(f"%{count + i}" for i in range(4))
    return f"""
__device__ __forceinline__ void {name}(float* d, const unsigned int* a, unsigned long long b, int add) {{
  asm volatile("{{.reg .pred p; setp.ne.b32 p, %{count + 5}, 0; "
    "wgmma.mma_async.sync.aligned.m64n{columns}{kind} {{{outs}}}, {{{a}}}, %{count + 4}, p, 1, 1{rest};}}"
    : {registers} : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}}
"""


@lru_cache(maxsize=32)
def _product(name: str, columns: int, tiles: int, stride: int) -> str:
    one = f"moec_wgmma{columns}"
    calls = "\n".join(f"  {one}(d + {m * stride}, a + {4 * m}, b, add);" for m in range(tiles))
    head = f"__device__ __forceinline__ void {name}(float* d, const unsigned int* a, unsigned long long b, int add) {{"
    return f"""{MMA}{_WARP}
{_HOPPER}
#ifndef MOEC_WGMMA{columns}
#define MOEC_WGMMA{columns}{_wgmma(one, columns, "k16.f32.bf16.bf16", ", 0")}#endif
{head}
{calls}
}}
#else
{head}
  moec_warp_product<{columns}, {tiles}, {stride}>(d, a, b, add);
}}
#endif
"""


def multiply(columns: int, tiles: int, d: Expr, stride: int, a: Expr, b: Expr, add: Expr) -> None:
    """d[m] = A[m] B (+ d[m] where `add`) of `tiles` fragments A[64, 16] in registers, B [16, columns] in shared memory, asynchronously.

    Args:
        d: float32 [columns / 2] of each tile, `stride` apart.
        a: uint32 [tiles, 4].
        b: its descriptor.
    """
    name = f"moec_product{columns}_{tiles}_{stride}"
    call(name, _product(name, columns, tiles, stride), d, a, b, add)


def wgmma_e4m3(columns: int, d: Expr, a: Expr, b: Expr, add: Expr) -> None:
    """The same of one A[64, 32] and B[32, columns] of E4M3: of a row of A, register r has columns 4 t to 4 t + 3, of r = 2, 3 plus 16."""
    name = f"moec_wgmma_e4m3_{columns}"
    call(name, _wgmma(name, columns, "k32.f32.e4m3.e4m3", ""), d, a, b, add)


_ORDER = r"""
#ifndef MOEC_WGMMA_ORDER
#define MOEC_WGMMA_ORDER
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
__device__ __forceinline__ void moec_wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void moec_wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void moec_wgmma_wait0() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }
__device__ __forceinline__ void moec_wgmma_wait1() { asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory"); }
#else
__device__ __forceinline__ void moec_wgmma_fence() {}
__device__ __forceinline__ void moec_wgmma_commit() {}
__device__ __forceinline__ void moec_wgmma_wait0() {}
__device__ __forceinline__ void moec_wgmma_wait1() {}
#endif
#endif
"""


def wgmma_fence() -> None:
    """What registers hold now, the next products may use."""
    call("moec_wgmma_fence", _ORDER)


def wgmma_commit() -> None:
    """The products since the last commit are a group."""
    call("moec_wgmma_commit", _ORDER)


def wgmma_wait(groups: int) -> None:
    """Wait until at most 0 or 1 groups are under way."""
    call(f"moec_wgmma_wait{groups}", _ORDER)


@lru_cache(maxsize=32)
def _pin(count: int) -> str:
    registers = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    return f"""
__device__ __forceinline__ void moec_pin{count}(float* d) {{ asm volatile("" : {registers} :: "memory"); }}
"""


def pin(d: Expr, count: int) -> None:
    """Sums are final here: the compiler must not move their uses before."""
    call(f"moec_pin{count}", _pin(count), d)


_OPERAND = r"""
#ifndef MOEC_OPERAND
#define MOEC_OPERAND
__device__ __forceinline__ void moec_proxy_fence() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
__device__ __forceinline__ unsigned long long moec_descriptor(unsigned int address) {
  return (unsigned long long)((address & 0x3FFFF) >> 4) | (1ull << 16) | (64ull << 32) | (1ull << 62);
}
#endif
"""


def proxy_fence() -> None:
    """What this thread wrote to shared memory, or has copied there, the tensor cores see."""
    call("moec_proxy_fence", _OPERAND)


def descriptor(address: Expr) -> Expr:
    """The descriptor of rows of 128 swizzled bytes at a multiple of 1024."""
    return call("moec_descriptor", _OPERAND, address, result="uint64")


@lru_cache(maxsize=4)
def _store_matrix(count: int) -> str:
    registers = ",".join(f"%{i + 1}" for i in range(count))
    operands = ", ".join(f'"r"(r[{i}])' for i in range(count))
    return f"""
__device__ __forceinline__ void moec_store_matrix{count}(unsigned int d, const unsigned int* r) {{
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x{count}.trans.shared.b16 [%0], {{{registers}}};" :: "r"(d), {operands} : "memory");
#else
  const unsigned int lane = threadIdx.x & 31;
  #pragma unroll
  for (int i = 0; i < {count}; ++i)
    #pragma unroll
    for (int c = 0; c < 2; ++c) {{
      const unsigned int p = __shfl_sync(0xffffffffu, d, 8 * i + lane % 4 * 2 + c) + lane / 4 * 2;
      asm volatile("st.shared.u16 [%0], %1;" :: "r"(p), "h"((unsigned short)(r[i] >> 16 * c)) : "memory");
    }}
#endif
}}
"""


def store_matrix(target: Expr, registers: Expr, count: int) -> None:
    """Store 1, 2 or 4 tiles of 8 by 8 numbers of 16 bits, transposed: lane 4 g + t has row g, columns 2 t and 2 t + 1 of each.

    Args:
        target: where in shared memory lane 8 i + j wants column j of tile i, 16 bytes.
        registers: uint32 [count].
    """
    call(f"moec_store_matrix{count}", _store_matrix(count), target, registers)
