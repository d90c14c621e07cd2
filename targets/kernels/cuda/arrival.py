"""Which thread block of several is the last one, so that it can go on with what all of them wrote, within one kernel."""

from __future__ import annotations

from tvm.tirx.script import builder as T

from moec.targets.kernels.cuda.emit import Buffer, Expr, at
from moec.targets.kernels.cuda.intrinsics import call

SEMAPHORES = 256
"""int32 of the array that the kernels of a stream share."""

_ARRIVE = r"""
#ifndef MOEC_ARRIVE
#define MOEC_ARRIVE
__device__ __forceinline__ bool moec_arrives_last(void* semaphore, int total) {
  unsigned int before = 0, *s = (unsigned int*)semaphore;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(before) : "l"(s), "r"((unsigned int)total - 1) : "memory");
  return before + 1 == (unsigned int)total;
}
__device__ __forceinline__ int moec_last_arrival(void* semaphore, int total) {
  __syncthreads();
  return __syncthreads_or(threadIdx.x == 0 && moec_arrives_last(semaphore, total));
}
__device__ __forceinline__ int moec_last_warp(void* semaphore, int total) {
  __syncwarp();
  if (total == 1) return 1;
  const int last = threadIdx.x % 32 == 0 && moec_arrives_last(semaphore, total);
  __syncwarp();
  return __shfl_sync(0xffffffffu, last, 0);
}
#endif
"""


def last_arrival(semaphores: Buffer, index: Expr, total: Expr) -> Expr:
    """Say that a block has written its share: int32, not zero in all threads of the one block of `total` that is the last to come here.

    What all of them wrote before is then to be seen by that block. All threads of a block come here. Semaphore `index` of the array has to
    be zero before, and is zero afterwards, so that kernels of a stream share the array; a kernel that was launched early arrives after
    its `grid_wait`. A block is a row of threads. It acquires and releases at the scope of the GPU, as in
    https://docs.nvidia.com/cuda/parallel-thread-execution/#causality-order.
    """
    return T.Bind(call("moec_last_arrival", _ARRIVE, at(semaphores, index), total, result="int32"))


def last_warp(semaphores: Buffer, index: Expr, total: Expr) -> Expr:
    """As `last_arrival`, for one warp of each of `total` blocks: what these warps wrote is to be seen by the last of them."""
    return T.Bind(call("moec_last_warp", _ARRIVE, at(semaphores, index), total, result="int32"))
