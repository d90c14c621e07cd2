"""Copies into shared memory that go on while a thread does other things (`cp.async`)."""

from __future__ import annotations

from moec.targets.kernels.cuda.emit import Expr
from moec.targets.kernels.cuda.intrinsics import call

_FETCH = r"""
#ifndef MOEC_FETCH
#define MOEC_FETCH
__device__ __forceinline__ void moec_fetch16(void* d, const void* p, int bytes) {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
    :: "r"((unsigned int)__cvta_generic_to_shared(d)), "l"(p), "r"(bytes) : "memory");
#else
  for (int i = 0; i < 16; ++i) ((char*)d)[i] = i < bytes ? ((const char*)p)[i] : 0;
#endif
}
__device__ __forceinline__ void moec_fetch_commit() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int N> __device__ __forceinline__ void moec_fetch_wait() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory");
#endif
  __syncwarp();
}
#endif
"""


def fetch16(target: Expr, source: Expr, count: Expr) -> None:
    """Begin to copy 16 bytes, of which `count` are read; the others become zeros."""
    call("moec_fetch16", _FETCH, target, source, count)


def fetch_commit() -> None:
    """What a thread began to copy since the last time is a group."""
    call("moec_fetch_commit", _FETCH)


def fetch_wait(groups: int) -> None:
    """Wait until at most so many groups of each of a warp's threads are on their way; the warp sees the others."""
    call(f"moec_fetch_wait<{groups}>", _FETCH)


def sync_warp() -> None:
    """Wait for the threads of the warp, and see what they wrote."""
    call("__syncwarp", "")
