// The PTX instructions that kernels state themselves, as functions of their operands, results first.
#pragma once
#include "emulator.h"

namespace ptx {
[[noreturn]] inline void unknown(const char* what) {
  fprintf(stderr, "emulator: not emulated: %s\n", what);
  abort();
}
inline float low(uint32_t pair) { return __uint_as_float(pair << 16); }
inline float high(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }
inline uint32_t pack(double low, double high) {
  return uint32_t(__nv_bfloat16(float(low)).bits) | uint32_t(__nv_bfloat16(float(high)).bits) << 16;
}

inline void fma_bf16x2(uint32_t& d, uint32_t a, uint32_t b, uint32_t c) {  // a product of bfloat16 is exact in double
  d = pack(double(low(a)) * low(b) + low(c), double(high(a)) * high(b) + high(c));
}
inline void pick(uint32_t& d, uint32_t x, uint32_t mask, uint32_t y) { d = (x & mask) | y; }
inline void pick_not(uint32_t& d, uint32_t x, uint32_t mask, uint32_t y) { d = (~x & mask) | y; }
inline void pack_bf16x2(uint32_t& d, float upper, float lower) { d = pack(lower, upper); }
// E4M3 (OCP 8-bit floating point): a bias of 7, no infinity, NaN where all 7 bits are set, 448 the largest.
inline double e4m3(uint8_t x) {
  const int exponent = x >> 3 & 15, mantissa = x & 7;
  const double found = exponent ? ldexp(8 + mantissa, exponent - 10) : ldexp(mantissa, -9);
  return (x & 0x7f) == 0x7f ? NAN : x & 0x80 ? -found : found;
}
inline uint8_t to_e4m3(float x) {
  if (x != x) return 0x7f;
  const double size = std::min(fabs(double(x)), 448.0);
  const int exponent = std::max(size > 0 ? ilogb(size) : -6, -6);
  const int code = int(std::nearbyint(ldexp(size, 3 - exponent)));  // 8 to 16, or less where it is subnormal
  return uint8_t((std::signbit(x) ? 0x80 : 0) | ((exponent + 6) * 8 + code));
}
inline void pack_e4m3x2(uint16_t& d, float upper, float lower) { d = uint16_t(to_e4m3(upper) << 8 | to_e4m3(lower)); }
inline void unpack_f16x2(float& lower, float& upper, uint32_t pair) {
  half parts[2];
  memcpy(parts, &pair, 4);
  lower = float(parts[0]);
  upper = float(parts[1]);
}
inline void load(uint32_t& a, const void* p) { memcpy(&a, p, 4); }
inline void load(uint32_t& a, uint32_t& b, const void* p) { load(a, p), load(b, (const char*)p + 4); }
inline void load(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d, const void* p) {
  if (uintptr_t(p) % 16) unknown("a load of 16 bytes that are not aligned");
  load(a, b, p), load(c, d, (const char*)p + 8);
}
inline void store(void* p, float a, float b, float c, float d) {
  if (uintptr_t(p) % 16) unknown("a store of 16 bytes that are not aligned");
  const float values[4] = {a, b, c, d};
  memcpy(p, values, 16);
}

// Of a whole warp: `warp.cc`.
void mma(float& d0, float& d1, float& d2, float& d3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1);
void mma(int& d0, int& d1, int& d2, int& d3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1);
void store_tiles(uint32_t d, uint32_t a, uint32_t b, uint32_t c, uint32_t e, int count);
void read_tiles(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& e, uint32_t p);
void wgmma(float** d, int count, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t descriptor, int add);
void wgmma_e4m3(float** d, int count, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t descriptor, int add);

// An mbarrier in the memory of a block of the cluster: a phase is over when all have arrived and as many bytes have come as were expected.
// Copies are done at once; those of another block may come before they are expected.
struct MBarrier { int32_t bytes; int16_t pending; uint8_t count, phase; };
inline MBarrier& mbarrier(uint32_t b, int rank) { return *(MBarrier*)(emulator::memory + rank * emulator::SHARED + b); }
inline int own_rank() { return emulator::current / emulator::block_size; }
inline void barrier_init(uint32_t b, int count) { mbarrier(b, own_rank()) = {0, int16_t(count), uint8_t(count), 0}; }
UNSEEN inline void change(MBarrier& barrier, int arrivals, int bytes) {
  barrier.pending -= arrivals, barrier.bytes += bytes;
  if (barrier.pending == 0 && barrier.bytes == 0) barrier.pending = barrier.count, ++barrier.phase;
  ++emulator::progress;
}
inline void barrier_change(uint32_t b, int rank, int arrivals, int bytes) {
  before(&mbarrier(b, rank));
  change(mbarrier(b, rank), arrivals, bytes);
}
inline void barrier_arrive(uint32_t b, int rank) { barrier_change(b, rank, 1, 0); }
inline void barrier_expect(uint32_t b, int bytes) { barrier_change(b, own_rank(), 1, bytes); }
UNSEEN inline void wait(const MBarrier& barrier, int parity) {
  while ((barrier.phase & 1) == parity) emulator::yield();
}
inline void barrier_wait(uint32_t b, int parity) {
  wait(mbarrier(b, own_rank()), parity);
  after(&mbarrier(b, own_rank()));
}
inline void copy_to(int rank, uint32_t d, const void* p, int bytes, uint32_t b) {
  if (d % 16 || uintptr_t(p) % 16 || bytes % 16 || bytes <= 0) unknown("a bulk copy that is no multiple of 16 bytes");
  memcpy(emulator::memory + rank * emulator::SHARED + d, p, bytes);
  barrier_change(b, rank, 0, -bytes);
}
inline void bulk_copy(uint32_t d, const void* p, int bytes, uint32_t b) { copy_to(own_rank(), d, p, bytes, b); }
inline void bulk_copy_all(uint32_t d, const void* p, int bytes, uint32_t b, int mask) {
  for (int rank = 0; mask >> rank; ++rank)
    if (mask >> rank & 1) copy_to(rank, d, p, bytes, b);
}
inline void cluster_wait() { emulator::arrive(emulator::cluster); }

// Memory of a block of the cluster is where `memory` has it.
inline void map_rank(uint32_t& there, uint32_t address, int rank) {
  if (rank >= int(emulator::blocks.size())) unknown("the memory of a block that the cluster does not have");
  there = rank * emulator::SHARED + address;
}
inline void read_cluster(float& a, float& b, float& c, float& d, uint32_t there) {
  if (there % 16) unknown("a load of 16 bytes that are not aligned");
  float* target[4] = {&a, &b, &c, &d};
  for (int i = 0; i < 4; ++i) memcpy(target[i], emulator::memory + there + 4 * i, 4);
}
inline void write_cluster(uint32_t there, int value) { memcpy(emulator::memory + there, &value, 4); }

inline void read_shared(float& a, float& b, uint32_t p) {
  memcpy(&a, emulator::shared + p, 4), memcpy(&b, emulator::shared + p + 4, 4);
}

inline void atomic_inc(uint32_t& before, uint32_t* p, uint32_t most) { before = atomicInc(p, most); }

// The address of shared memory as 32 bits is the place in it.
inline void copy16(uint32_t d, const void* p, int bytes) {
  memset(emulator::shared + d, 0, 16);
  memcpy(emulator::shared + d, p, bytes);
}

inline void copy8(uint32_t d, const void* p) { memcpy(emulator::shared + d, p, 8); }

inline void store_matrix(uint32_t d, uint32_t a) { store_tiles(d, a, 0, 0, 0, 1); }
inline void store_matrix(uint32_t d, uint32_t a, uint32_t b) { store_tiles(d, a, b, 0, 0, 2); }
inline void store_matrix(uint32_t d, uint32_t a, uint32_t b, uint32_t c, uint32_t e) { store_tiles(d, a, b, c, e, 4); }

inline void store2(uint32_t p, uint16_t x) { memcpy(emulator::shared + p, &x, 2); }

inline void wait_products() { __syncwarp(); }  // products are done at once, but only then has every lane read what it multiplies
inline void mma_first(float& d0, float& d1, float& d2, float& d3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1,
                      float c) {
  d0 = d1 = d2 = d3 = c;
  mma(d0, d1, d2, d3, a0, a1, a2, a3, b0, b1);
}
}  // namespace ptx

inline size_t __cvta_generic_to_shared(const void* p) { return (const unsigned char*)p - emulator::shared; }
