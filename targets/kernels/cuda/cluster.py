"""Device functions of clusters: blocks of threads that run at the same time and read each other's shared memory.

A multiprocessor of compute capability 9.0 is needed (PTX ISA, "barrier.cluster" and "mapa").
"""

from __future__ import annotations

from moec.targets.kernels.cuda.emit import Expr
from moec.targets.kernels.cuda.intrinsics import call

MOST = 8
"""Blocks of a cluster that every GPU with clusters runs."""

_CLUSTER = r"""
#ifndef MOEC_CLUSTER
#define MOEC_CLUSTER
__device__ __forceinline__ void moec_cluster_sync() {
  asm volatile("barrier.cluster.arrive.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
}
__device__ __forceinline__ void moec_cluster_read4(float* d, unsigned int p, int rank) {
  unsigned int there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(p), "r"(rank));
  asm volatile("ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3]) : "r"(there) : "memory");
}
__device__ __forceinline__ void moec_cluster_write(unsigned int p, int rank, int value) {
  unsigned int there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(p), "r"(rank));
  asm volatile("st.shared::cluster.u32 [%0], %1;" :: "r"(there), "r"(value) : "memory");
}
#endif
"""


def cluster_sync() -> None:
    """Wait for all threads of the cluster: each sees what the others have written to shared memory before, as after `sync`."""
    call("moec_cluster_sync", _CLUSTER)


def cluster_read4(target: Expr, address: Expr, rank: Expr) -> None:
    """Read four float32 from the shared memory of a block of the cluster.

    Args:
        address: where this block has them in its own memory, as `shared_address` has it.
        rank: of the block.
    """
    call("moec_cluster_read4", _CLUSTER, target, address, rank)


def cluster_write(address: Expr, rank: Expr, value: Expr) -> None:
    """Write an int32 to the shared memory of a block of the cluster, at the address that this block has in its own."""
    call("moec_cluster_write", _CLUSTER, address, rank, value)
