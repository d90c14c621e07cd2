// What all lanes of a warp do together. Compiled once, and well: most of the time of a kernel with products goes here.
#include "ptx.h"

namespace ptx {
// mma.m16n8k16 of bfloat16 and mma.m16n8k32 of bytes (PTX ISA, "Matrix Fragments"): lane 4 g + t has rows g and g + 8 of A, column g of B,
// and columns 2 t and 2 t + 1 of D; a register is 2 or 4 numbers of a row or a column. What the lanes of a warp bring lies in one of two
// places in turn, so that none is overwritten before all have read it.
struct Fragments { uint32_t a[4], b[2]; };
UNSEEN static const Fragments* share(Fragments own) {
  constexpr int MOST = 8 * 1024;
  static Fragments all[2][MOST];
  const int me = emulator::current;
  Fragments* warp = &all[emulator::warps[me / 32].generation & 1][me / 32 * 32];
  warp[me % 32] = own;
  emulator::arrive(emulator::warps[me / 32]);
  return warp;
}
template <typename T, typename Dot>
static void mma(T& d0, T& d1, T& d2, T& d3, Fragments own, Dot dot) {
  const Fragments* warp = share(own);
  int g = emulator::current % 32 / 4, t = emulator::current % 4;
  T* d[4] = {&d0, &d1, &d2, &d3};
  for (int i = 0; i < 4; ++i) {
    auto sum = dot(0, 0) + *d[i];
    for (int k = 0; k < 8; ++k) sum += dot(warp[4 * g + k % 4].a[k / 4 * 2 + i / 2], warp[4 * (2 * t + i % 2) + k % 4].b[k / 4]);
    *d[i] = T(sum);
  }
}
void mma(float& d0, float& d1, float& d2, float& d3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  mma(d0, d1, d2, d3, {{a0, a1, a2, a3}, {b0, b1}},
      [](uint32_t x, uint32_t y) { return double(low(x)) * low(y) + double(high(x)) * high(y); });
}
void mma(int& d0, int& d1, int& d2, int& d3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  mma(d0, d1, d2, d3, {{a0, a1, a2, a3}, {b0, b1}}, [](uint32_t x, uint32_t y) {
    int sum = 0;
    for (int i = 0; i < 32; i += 8) sum += int(uint8_t(x >> i)) * int8_t(y >> i);
    return sum;
  });
}

// stmatrix, transposed: lane 8 i + j says where column j of tile i goes, whose element of row g is in lane 4 g + j / 2.
void store_tiles(uint32_t d, uint32_t a, uint32_t b, uint32_t c, uint32_t e, int count) {
  const int me = emulator::current, lane = me % 32, tile = lane / 8, column = lane % 8;
  const Fragments* warp = share({{a, b, c, e}, {}});
  if (tile < count)
    for (int g = 0; g < 8; ++g) {
      const uint32_t pair = warp[4 * g + column / 2].a[tile];
      const uint16_t bits = column % 2 ? pair >> 16 : pair & 0xffff;
      memcpy(emulator::shared + d + 2 * g, &bits, 2);
    }
}
// ldmatrix: lane 8 i + j says where row j of tile i is, of which lane 4 j + t gets elements 2 t and 2 t + 1.
void read_tiles(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& e, uint32_t p) {
  if (p % 16) unknown("a row of ldmatrix that is not aligned");
  const int lane = emulator::current % 32;
  const Fragments* warp = share({{p, 0, 0, 0}, {}});
  uint32_t* target[4] = {&a, &b, &c, &e};
  for (int i = 0; i < 4; ++i) memcpy(target[i], emulator::shared + warp[8 * i + lane / 4].a[0] + lane % 4 * 4, 4);
}
// wgmma.m64nNk16 of bfloat16: a warp has 16 of the rows, A like that of mma; B is rows of 128 bytes in shared memory, their 16-byte pieces
// exchanged (piece i of row r is at i ^ (r mod 8)).
void wgmma(float** d, int count, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t descriptor, int add) {
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
static const struct Values {
  double of[256];
  Values() { for (int i = 0; i < 256; ++i) of[i] = e4m3(uint8_t(i)); }
} values;
// wgmma.m64nNk32 of E4M3: of a row of A, register r has columns 4 t to 4 t + 3, of r = 2 and 3 plus 16.
void wgmma_e4m3(float** d, int count, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t descriptor, int add) {
  int me = emulator::current, g = me % 32 / 4, t = me % 4;
  const Fragments* warp = share({{a0, a1, a2, a3}, {}});
  const uint32_t first = uint32_t(descriptor & 0x3fff) << 4, column = first % 128;
  for (int i = 0; i < count; ++i) {
    const int token = i / 4 * 8 + 2 * t + i % 2;
    double sum = add ? *d[i] : 0;
    for (int k = 0; k < 32; ++k) {
      const uint32_t x = warp[4 * g + k % 16 / 4].a[k / 16 * 2 + i % 4 / 2], piece = ((column + k) / 16) ^ (token % 8);
      sum += values.of[x >> k % 4 * 8 & 0xff] * values.of[emulator::shared[first / 128 * 128 + token * 128 + piece * 16 + k % 16]];
    }
    *d[i] = float(sum);
  }
}
}  // namespace ptx
