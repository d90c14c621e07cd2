"""Device functions of the large products: `wgmma` with the weights in registers and the activations in shared memory.

A stage of activations [N tokens, 128] bfloat16 lies as two halves of 64 columns, rows of 128 bytes whose 16-byte pieces are exchanged
(piece i of row r is at i ^ (r mod 8)), which is the tensor cores' 128-byte swizzle (PTX ISA, "Asynchronous warpgroup-level matrix shared
memory layout"). A multiprocessor of compute capability 9.0 is needed.
"""

from __future__ import annotations

from functools import lru_cache

from moec.targets.kernels.cuda.emit import Expr
from moec.targets.kernels.cuda.intrinsics import call


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


def wgmma(columns: int, d: Expr, a: Expr, b: Expr, add: Expr) -> None:
    """d[columns / 2] = A[64, 16] B[16, columns] (+ d where `add`), asynchronously: A fragments in registers, B by its descriptor."""
    name = f"moec_wgmma{columns}"
    call(name, _wgmma(name, columns, "k16.f32.bf16.bf16", ", 0"), d, a, b, add)


def wgmma_e4m3(columns: int, d: Expr, a: Expr, b: Expr, add: Expr) -> None:
    """The same of A[64, 32] and B[32, columns] that are E4M3: of a row of A, register r has columns 4 t to 4 t + 3, of r = 2, 3 plus 16."""
    name = f"moec_wgmma_e4m3_{columns}"
    call(name, _wgmma(name, columns, "k32.f32.e4m3.e4m3", ""), d, a, b, add)


_ORDER = r"""
#ifndef MOEC_WGMMA_ORDER
#define MOEC_WGMMA_ORDER
__device__ __forceinline__ void moec_wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void moec_wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void moec_wgmma_wait0() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }
__device__ __forceinline__ void moec_wgmma_wait1() { asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory"); }
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
__device__ __forceinline__ void moec_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
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
  asm volatile("stmatrix.sync.aligned.m8n8.x{count}.trans.shared.b16 [%0], {{{registers}}};" :: "r"(d), {operands} : "memory");
}}
"""


def store_matrix(target: Expr, registers: Expr, count: int) -> None:
    """Store 1, 2 or 4 tiles of 8 by 8 numbers of 16 bits, transposed: lane 4 g + t has row g, columns 2 t and 2 t + 1 of each.

    Args:
        target: where in shared memory lane 8 i + j wants column j of tile i, 16 bytes.
        registers: uint32 [count].
    """
    call(f"moec_store_matrix{count}", _store_matrix(count), target, registers)
