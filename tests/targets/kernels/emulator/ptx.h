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

// mma.m16n8k16 of bfloat16 and mma.m16n8k32 of bytes (PTX ISA, "Matrix Fragments"): lane 4 g + t has rows g and g + 8 of A, column g of B,
// and columns 2 t and 2 t + 1 of D; a register is 2 or 4 numbers of a row or a column. What the lanes of a warp bring lies in one of two
// places in turn, so that none is overwritten before all have read it.
struct Fragments { uint32_t a[4], b[2]; };
UNSEEN inline Fragments* share(Fragments own) {
  constexpr int MOST = 8 * 1024;
  static Fragments all[2 * MOST];
  static int turns[MOST];
  int me = emulator::current;
  Fragments* warp = &all[MOST * (turns[me]++ & 1) + me / 32 * 32];
  warp[me % 32] = own;
  emulator::arrive(emulator::warps[me / 32]);
  return warp;
}
template <typename T, typename Dot>
void mma(T& d0, T& d1, T& d2, T& d3, Fragments own, Dot dot) {
  const Fragments* warp = share(own);
  int g = emulator::current % 32 / 4, t = emulator::current % 4;
  T* d[4] = {&d0, &d1, &d2, &d3};
  for (int i = 0; i < 4; ++i) {
    auto sum = dot(0, 0) + *d[i];
    for (int k = 0; k < 8; ++k) sum += dot(warp[4 * g + k % 4].a[k / 4 * 2 + i / 2], warp[4 * (2 * t + i % 2) + k % 4].b[k / 4]);
    *d[i] = T(sum);
  }
}
inline void mma(float& d0, float& d1, float& d2, float& d3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  mma(d0, d1, d2, d3, {{a0, a1, a2, a3}, {b0, b1}},
      [](uint32_t x, uint32_t y) { return double(low(x)) * low(y) + double(high(x)) * high(y); });
}
inline void mma(int& d0, int& d1, int& d2, int& d3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  mma(d0, d1, d2, d3, {{a0, a1, a2, a3}, {b0, b1}}, [](uint32_t x, uint32_t y) {
    int sum = 0;
    for (int i = 0; i < 32; i += 8) sum += int(uint8_t(x >> i)) * int8_t(y >> i);
    return sum;
  });
}

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

// stmatrix, transposed: lane 8 i + j says where column j of tile i goes, whose element of row g is in lane 4 g + j / 2.
inline void store_tiles(uint32_t d, const Fragments& own, int count) {
  const int me = emulator::current, lane = me % 32, tile = lane / 8, column = lane % 8;
  const Fragments* warp = share(own);
  if (tile < count)
    for (int g = 0; g < 8; ++g) {
      const uint32_t pair = warp[4 * g + column / 2].a[tile];
      const uint16_t bits = column % 2 ? pair >> 16 : pair & 0xffff;
      memcpy(emulator::shared + d + 2 * g, &bits, 2);
    }
}
inline void store_matrix(uint32_t d, uint32_t a) { store_tiles(d, {{a, 0, 0, 0}, {}}, 1); }
inline void store_matrix(uint32_t d, uint32_t a, uint32_t b) { store_tiles(d, {{a, b, 0, 0}, {}}, 2); }
inline void store_matrix(uint32_t d, uint32_t a, uint32_t b, uint32_t c, uint32_t e) { store_tiles(d, {{a, b, c, e}, {}}, 4); }

// ldmatrix: lane 8 i + j says where row j of tile i is, of which lane 4 j + t gets elements 2 t and 2 t + 1.
inline void read_tiles(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& e, uint32_t p) {
  if (p % 16) unknown("a row of ldmatrix that is not aligned");
  const int lane = emulator::current % 32;
  const Fragments* warp = share({{p, 0, 0, 0}, {}});
  uint32_t* target[4] = {&a, &b, &c, &e};
  for (int i = 0; i < 4; ++i) memcpy(target[i], emulator::shared + warp[8 * i + lane / 4].a[0] + lane % 4 * 4, 4);
}
inline void store2(uint32_t p, uint16_t x) { memcpy(emulator::shared + p, &x, 2); }

// wgmma.m64nNk16 of bfloat16: a warp has 16 of the rows, A like that of mma; B is rows of 128 bytes in shared memory, their 16-byte pieces
// exchanged (piece i of row r is at i ^ (r mod 8)).
inline void wgmma(float** d, int count, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t descriptor, int add) {
  int me = emulator::current, g = me % 32 / 4, t = me % 4;
  const Fragments* warp = share({{a0, a1, a2, a3}, {}});
  const uint32_t first = uint32_t(descriptor & 0x3fff) << 4, column = first % 128 / 2;
  for (int i = 0; i < count; ++i) {
    const int token = i / 4 * 8 + 2 * t + i % 2;
    double sum = add ? *d[i] : 0;
    for (int k = 0; k < 16; ++k) {
      const uint32_t x = warp[4 * g + k % 8 / 2].a[k / 8 * 2 + i % 4 / 2], piece = ((column + k) / 8) ^ (token % 8);
      uint16_t y;
      memcpy(&y, emulator::shared + first / 128 * 128 + token * 128 + piece * 16 + k % 8 * 2, 2);
      sum += double(k % 2 ? high(x) : low(x)) * low(y);
    }
    *d[i] = float(sum);
  }
}
// wgmma.m64nNk32 of E4M3: of a row of A, register r has columns 4 t to 4 t + 3, of r = 2 and 3 plus 16.
inline void wgmma_e4m3(float** d, int count, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t descriptor, int add) {
  int me = emulator::current, g = me % 32 / 4, t = me % 4;
  const Fragments* warp = share({{a0, a1, a2, a3}, {}});
  const uint32_t first = uint32_t(descriptor & 0x3fff) << 4, column = first % 128;
  for (int i = 0; i < count; ++i) {
    const int token = i / 4 * 8 + 2 * t + i % 2;
    double sum = add ? *d[i] : 0;
    for (int k = 0; k < 32; ++k) {
      const uint32_t x = warp[4 * g + k % 16 / 4].a[k / 16 * 2 + i % 4 / 2], piece = ((column + k) / 16) ^ (token % 8);
      sum += e4m3(x >> k % 4 * 8) * e4m3(emulator::shared[first / 128 * 128 + token * 128 + piece * 16 + k % 16]);
    }
    *d[i] = float(sum);
  }
}
inline void wait_products() { __syncwarp(); }  // products are done at once, but only then has every lane read what it multiplies
inline void mma_first(float& d0, float& d1, float& d2, float& d3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1,
                      float c) {
  d0 = d1 = d2 = d3 = c;
  mma(d0, d1, d2, d3, a0, a1, a2, a3, b0, b1);
}
}  // namespace ptx

inline size_t __cvta_generic_to_shared(const void* p) { return (const unsigned char*)p - emulator::shared; }
