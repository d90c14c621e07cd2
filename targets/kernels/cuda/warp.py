"""What the 32 lanes of a warp tell each other, and sums over the threads of a block."""

from __future__ import annotations

from tvm import tirx
from tvm.tirx.script import builder as T

from moec.targets.kernels.cuda.emit import WARP, Expr, Shared, store, sync, when
from moec.targets.kernels.cuda.intrinsics import call

_REDUCE = r"""
#ifndef MOEC_REDUCE
#define MOEC_REDUCE
__device__ __forceinline__ float moec_sum(float x, int lanes) {
  for (int i = lanes / 2; i; i >>= 1) x += __shfl_xor_sync(0xffffffffu, x, i);
  return x;
}
__device__ __forceinline__ float moec_max(float x) {
  for (int i = 16; i; i >>= 1) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, i));
  return x;
}
__device__ __forceinline__ int moec_argmax(float x, int at) {
  for (int i = 16; i; i >>= 1) {
    const float other = __shfl_xor_sync(0xffffffffu, x, i);
    const int there = __shfl_xor_sync(0xffffffffu, at, i);
    if (other > x || (other == x && there < at)) { x = other; at = there; }
  }
  return at;
}
template <int N> __device__ __forceinline__ float moec_sums(const float* from, int lane) {
  float x[N];
  #pragma unroll
  for (int i = 0; i < N; ++i) x[i] = from[i];
  int distance = 16;
  #pragma unroll
  for (int n = N / 2; n; n >>= 1, distance >>= 1) {
    const bool high = lane & distance;
    #pragma unroll
    for (int i = 0; i < n; ++i) {
      const float own = high ? x[i + n] : x[i], other = high ? x[i] : x[i + n];
      x[i] = own + __shfl_xor_sync(0xffffffffu, other, distance);
    }
  }
  #pragma unroll
  for (; distance; distance >>= 1) x[0] += __shfl_xor_sync(0xffffffffu, x[0], distance);
  return x[0];
}
template <typename T> __device__ __forceinline__ T moec_from(T x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
template <typename T> __device__ __forceinline__ T moec_across(T x, int distance) { return __shfl_xor_sync(0xffffffffu, x, distance); }
__device__ __forceinline__ float moec_sum_first(float x, int count) {
  float total = 0.f;
  for (int lane = 0; lane < count; ++lane) total += __shfl_sync(0xffffffffu, x, lane);
  return total;
}
#endif
"""


def warp_sum(x: Expr, lanes: int = WARP) -> Expr:
    """The sum of float32 over neighbouring lanes, a power of two of them, in each of these."""
    return T.Bind(call("moec_sum", _REDUCE, x, lanes, result="float32"))


def warp_sums(x: Expr, count: int, lane: Expr) -> Expr:
    """The sums of several float32 over a warp, a power of two of them: lane i has that of number i * count // 32.

    Lanes halve what they have as they exchange it, so that 8 sums take 9 exchanges, where one alone takes 5.
    """
    return T.Bind(call(f"moec_sums<{count}>", _REDUCE, x, lane, result="float32"))


def warp_max(x: Expr) -> Expr:
    """The largest float32 of a warp, in each lane."""
    return T.Bind(call("moec_max", _REDUCE, x, result="float32"))


def warp_argmax(x: Expr, index: Expr) -> Expr:
    """The int32 index that goes with the largest float32 of a warp, the lowest of several, in each lane."""
    return T.Bind(call("moec_argmax", _REDUCE, x, index, result="int32"))


def warp_from(x: Expr, lane: Expr, dtype: str) -> Expr:
    """What one lane has, in each lane."""
    return T.Bind(call("moec_from", _REDUCE, x, lane, result=dtype))


def warp_across(x: Expr, distance: int, dtype: str) -> Expr:
    """What the lane has whose number differs in the bit `distance`."""
    return T.Bind(call("moec_across", _REDUCE, x, distance, result=dtype))


def warp_sum_first(x: Expr, count: int) -> Expr:
    """The sum of float32 over the first lanes, in their order, in each lane."""
    return T.Bind(call("moec_sum_first", _REDUCE, x, count, result="float32"))


def warp_down(x: Expr, distance: int) -> Expr:
    """What the lane has that is so many further; the last lanes get something of no use."""
    return T.tvm_warp_shuffle_down(tirx.const(0xFFFFFFFF, "uint32"), x, distance, WARP, WARP)


def sync_warp() -> None:
    """Wait for the threads of the warp, and see what they wrote."""
    call("__syncwarp", "")


def block_sum(x: Expr, memory: Shared, thread: Expr, threads: int) -> Expr:
    """The sum of float32 over the threads of a block, in each of them; every thread has to come here. It takes 32 words at most."""
    x = warp_sum(x)
    if threads == WARP:
        return x
    parts = memory.take((threads // WARP,), "float32")
    with when(thread % WARP == 0):
        store(parts, x, thread // WARP)
    sync()
    total = parts[0]
    for warp in range(1, threads // WARP):
        total = total + parts[warp]
    return T.Bind(total)
