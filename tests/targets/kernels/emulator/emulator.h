// What generated CUDA code needs, for a C++ compiler: the threads of a block, or of a cluster of blocks, are coroutines that change
// places at barriers and shuffles. Blocks of a cluster have no `__shared__` variables, only memory that is given at the launch.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <setjmp.h>
#include <type_traits>
#include <ucontext.h>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define __align__(n) alignas(n)
#define __grid_constant__
#define __constant__
#define __host__

using half = _Float16;
using __half = _Float16;
struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  __nv_bfloat16(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    bits = x != x ? 0x7fff : (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  }
  operator float() const {
    uint32_t u = uint32_t(bits) << 16;
    float x;
    memcpy(&x, &u, 4);
    return x;
  }
};
inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline __nv_bfloat16 __float2bfloat16(float x) { return x; }
struct nv_bfloat162 {
  __nv_bfloat16 x, y;
  nv_bfloat162() = default;
  nv_bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) : x(x), y(y) {}
};
struct __half2 { half x, y; };
inline bool __hgt(half a, half b) { return a > b; }
inline bool __hlt(half a, half b) { return a < b; }
using nv_bfloat16 = __nv_bfloat16;

template <typename T, int N> struct vec;
#define VEC(name, T)                                  \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };  \
  struct name##3 { T x, y, z; };                      \
  struct alignas(4 * sizeof(T)) name##4 { T x, y, z, w; }; \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; } \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
VEC(float, float)
VEC(int, int)
VEC(uint, unsigned int)
VEC(longlong, long long)
VEC(ushort, unsigned short)

struct Index { unsigned int x, y, z; };
extern Index threadIdx, blockIdx, blockDim, gridDim;

// With a thread sanitizer the threads are its fibers. What the emulator itself keeps is none of its business; `before` and `after` say what
// barriers order.
#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#define UNSEEN __attribute__((no_sanitize("thread"), noinline))
inline void before(void* p) { __tsan_release(p); }
inline void after(void* p) { __tsan_acquire(p); }
#else
#define UNSEEN
inline void before(void*) {}
inline void after(void*) {}
#endif

namespace emulator {
struct Barrier { int waiting = 0, size = 0; long generation = 0; };
extern std::vector<Barrier> warps;
struct Block { Barrier barrier; int votes = 0; Index index; };
extern std::vector<Block> blocks;  // of a cluster
extern Barrier cluster;
extern int block_size;
extern int current;
extern long progress;
constexpr int SHARED = 1 << 18;
extern unsigned char memory[];  // SHARED bytes of each block of a cluster
extern unsigned char* shared;  // what the block of the current thread has, beyond variables
void yield();
void arrive(Barrier& barrier);
const uint64_t* bring(const void* value, size_t size);  // what the lanes of the warp bring, until the warp meets once more
template <typename T> T exchange(T value, int source) {
  memcpy(&value, &bring(&value, sizeof(T))[source], sizeof(T));
  return value;
}
}  // namespace emulator

void __syncthreads();
int __syncthreads_or(int x);
void __syncwarp(unsigned = ~0u);
inline void __threadfence() {}
template <typename T> T __shfl_xor_sync(unsigned, T x, int mask, int = 32) { return emulator::exchange(x, (emulator::current % 32) ^ mask); }
template <typename T> T __shfl_sync(unsigned, T x, int lane, int width = 32) {
  int me = emulator::current % 32;
  return emulator::exchange(x, me / width * width + lane % width);
}
template <typename T> T __shfl_down_sync(unsigned, T x, int by, int = 32) {
  int me = emulator::current % 32;
  return emulator::exchange(x, me + by < 32 ? me + by : me);
}
template <typename T> T __shfl_up_sync(unsigned, T x, int by, int = 32) {
  int me = emulator::current % 32;
  return emulator::exchange(x, me - by >= 0 ? me - by : me);
}
inline unsigned __ballot_sync(unsigned, bool x) {
  unsigned found = 0;
  const int value = x;
  const uint64_t* warp = emulator::bring(&value, sizeof(value));
  for (int lane = 0; lane < 32; ++lane) found |= unsigned(int(warp[lane]) != 0) << lane;
  return found;
}
template <typename T> unsigned __match_any_sync(unsigned, T x) {
  unsigned found = 0;
  const uint64_t* warp = emulator::bring(&x, sizeof(x));
  for (int lane = 0; lane < 32; ++lane) found |= unsigned(!memcmp(&warp[lane], &x, sizeof(x))) << lane;
  return found;
}
inline unsigned __reduce_max_sync(unsigned, unsigned x) {
  for (int i = 16; i; i >>= 1) x = std::max(x, emulator::exchange(x, (emulator::current % 32) ^ i));
  return x;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(int(x)); }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = uint64_t(y) << 32 | x;
  unsigned found = 0;
  for (int i = 0; i < 4; ++i) found |= unsigned(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return found;
}
template <typename T> T __ldg(const T* p) { return *p; }
template <typename T> UNSEEN T add_to(T* p, T x) { T old = *p; *p += x; return old; }
template <typename T> T atomicAdd(T* p, T x) { before(p); x = add_to(p, x); after(p); return x; }
UNSEEN inline unsigned increase(unsigned* p, unsigned most) { unsigned old = *p; *p = old >= most ? 0 : old + 1; return old; }
inline unsigned atomicInc(unsigned* p, unsigned most) { before(p); most = increase(p, most); after(p); return most; }
inline float __expf(float x) { return expf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline int __float2int_rn(float x) { return x != x ? 0 : int(std::nearbyint(double(x))); }
inline float __int_as_float(int x) { float y; memcpy(&y, &x, 4); return y; }
inline float __uint_as_float(unsigned x) { float y; memcpy(&y, &x, 4); return y; }
inline unsigned __float_as_uint(float x) { unsigned y; memcpy(&y, &x, 4); return y; }
inline float __half2float(half x) { return float(x); }
inline half __float2half(float x) { return half(x); }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
using std::max;
using std::min;
