"""Copies into shared memory that go on while a thread does other things (`cp.async`)."""

from __future__ import annotations

from moec.targets.kernels.cuda.emit import Expr
from moec.targets.kernels.cuda.intrinsics import call

_COPY = r"""
#ifndef MOEC_COPY
#define MOEC_COPY
__device__ __forceinline__ unsigned int moec_shared(const void* p) { return (unsigned int)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void moec_copy16(unsigned int d, const void* p, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(d), "l"(p), "r"(bytes) : "memory");
}
__device__ __forceinline__ void moec_copy16_ahead(unsigned int d, const void* p, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" :: "r"(d), "l"(p), "r"(bytes) : "memory");
}
__device__ __forceinline__ void moec_copy8(unsigned int d, const void* p) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" :: "r"(d), "l"(p) : "memory");
}
__device__ __forceinline__ void moec_copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ __forceinline__ void moec_copy_wait() { asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory"); }
#endif
"""


def shared_address(p: Expr) -> Expr:
    """The address of shared memory as 32 bits."""
    return call("moec_shared", _COPY, p, result="uint32")


def copy16(target: Expr, source: Expr, count: Expr, ahead: bool = True) -> None:
    """Begin to copy 16 bytes: `count` of them, and zeros for the rest.

    Args:
        target: as `shared_address` has it.
        ahead: the L2 cache fetches the 128 bytes that they are in, of which others are copied next.
    """
    call("moec_copy16_ahead" if ahead else "moec_copy16", _COPY, target, source, count)


def copy_words(target: Expr, source: Expr, count: int) -> None:
    """Begin to copy 2 or 4 words.

    Args:
        target: as `shared_address` has it.
    """
    if count == 4:
        copy16(target, source, 16, ahead=False)
    else:
        call("moec_copy8", _COPY, target, source)


def copy_commit() -> None:
    """What a thread began to copy since the last commit is a group."""
    call("moec_copy_commit", _COPY)


def copy_wait(groups: int) -> None:
    """Wait until at most so many groups of this thread are on their way."""
    call(f"moec_copy_wait<{groups}>", _COPY)
