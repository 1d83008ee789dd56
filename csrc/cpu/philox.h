// The dropout mask D, made again wherever it is needed and never stored.
//
//   key = (seed_lo, seed_hi)   counter = (row, col / 8, offset_lo, offset_hi)   Philox4x32, 7 rounds
//   bits(row, col) = half j % 2 (low half first) of output word j / 2, j = col % 8
//   D = bits >= t ? 1 / (1 - t / 65536) : 0
//
// Layout: one counter a 64-bit lane, so 8 elements of a row a lane. A round is 2 multiplies, 2 shifts and 4 xors; 7 of
// them for 8 elements come to about one vector instruction an element and lane group: integer work that rooflines
// count. Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once

#include "vec.h"

namespace svdkern {
namespace {

constexpr int L64 = W / 2;
typedef uint64_t U64 __attribute__((vector_size(8 * L64)));

// Low halves of the lanes multiplied to 64 bits; high halves of the inputs are ignored.
inline U64 multiply_low(U64 a, uint32_t b) {
#if defined(__AVX512F__)
  return bit_cast<U64>(_mm512_maskz_mul_epu32(0xff, bit_cast<__m512i>(a), _mm512_set1_epi64(b)));
#elif defined(__AVX2__)
  return bit_cast<U64>(_mm256_mul_epu32(bit_cast<__m256i>(a), _mm256_set1_epi64x(b)));
#elif defined(__SSE2__)
  return bit_cast<U64>(_mm_mul_epu32(bit_cast<__m128i>(a), _mm_set1_epi64x(b)));
#else
  return (a & 0xffffffffu) * static_cast<uint64_t>(b);
#endif
}

// Counter words in, output words out; the high half of each lane is garbage in and out.
template <int Rounds>
inline void philox4x32(U64 (&c)[4], uint32_t k0, uint32_t k1) {
#pragma GCC unroll 10
  for (int round = 0; round < Rounds; ++round) {
    const U64 p0 = multiply_low(c[0], 0xD2511F53u), p1 = multiply_low(c[2], 0xCD9E8D57u);
    c[0] = (p1 >> 32) ^ c[1] ^ static_cast<uint64_t>(k0);
    c[1] = p1;
    c[2] = (p0 >> 32) ^ c[3] ^ static_cast<uint64_t>(k1);
    c[3] = p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// The 16 random bits of elements 8 octet0 ... 8 (octet0 + octets) of one row; room for a multiple of 8 L64 of them.
inline void philox_bits(uint64_t seed, uint64_t offset, int64_t row, int64_t octet0, int64_t octets, uint16_t* bits) {
  U64 step;
  for (int i = 0; i < L64; ++i) step[i] = i;
  for (int64_t o = 0; o < octets; o += L64) {
    U64 c[4] = {U64{} + static_cast<uint32_t>(row), step + static_cast<uint64_t>(octet0 + o), U64{} + offset,
                U64{} + (offset >> 32)};
    philox4x32<7>(c, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
    const U64 low = (c[0] & 0xffffffffu) | (c[1] << 32), high = (c[2] & 0xffffffffu) | (c[3] << 32);
    for (int i = 0; i < L64; ++i) {
      const uint64_t words[2] = {low[i], high[i]};
      std::memcpy(bits + 8 * (o + i), words, sizeof(words));
    }
  }
}

constexpr int mask_columns = 64;  // columns that one call of mask_row makes

// keep[i] = D(row, col0 + i) for i < 64; col0 a multiple of 8.
inline void mask_row(const Dropout& d, int64_t row, int64_t col0, float* keep) {
  alignas(64) uint16_t bits[mask_columns];
  philox_bits(d.seed, d.offset, d.row0 + row, col0 / 8, mask_columns / 8, bits);
  const F factor = splat(static_cast<float>(1.0 / (1.0 - d.threshold / 65536.0)));
  for (int i = 0; i < mask_columns; i += W) {
    const U32 wide = __builtin_convertvector(*reinterpret_cast<const U16Unaligned*>(bits + i), U32);
    store(keep + i, bit_cast<F>(bit_cast<U32>(factor) & (U32)(wide >= d.threshold)));
  }
}

// D*x, zero where D is, infinite and NaN x included.
inline F masked(F x, F keep) { return bit_cast<F>(bit_cast<U32>(x * keep) & (U32)(keep != F{})); }

// x where D is not zero, else zero.
inline F kept(F x, F keep) { return bit_cast<F>(bit_cast<U32>(x) & (U32)(keep != F{})); }

// to[i] = from[i] where D(row, col0 + i) is not zero, for i < n: as it is, so that D's factor may follow in fp32.
template <class T>
inline void keep_run(const T* from, const Dropout& d, int64_t row, int64_t col0, int64_t n, T* to) {
  for (int64_t c = 0; c < n; c += mask_columns) {
    alignas(64) float keep[mask_columns];
    mask_row(d, row, col0 + c, keep);
    for (int64_t i = c; i < smaller(c + mask_columns, n); i += W) {
      const int64_t wide = smaller<int64_t>(W, n - i);
      store(to + i, kept(load(from + i, wide), load(keep + i - c)), wide);
    }
  }
}

}  // namespace
}  // namespace svdkern
