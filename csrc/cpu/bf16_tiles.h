// The two tiles of tiles.h with bf16 on both sides and vdpbf16ps: two products a lane and instruction, no upcasts.
//
//   dots   pairs lie along k already
//   rank   pairs lie across two rows of B: unpacked in registers, so a block of 32 columns of C is held as its "low"
//   and
//          "high" vectors (columns 0-3, 8-11, ... and 4-7, 12-15, ...) until `in_order` puts them back
//
// vdpbf16ps reads and writes subnormal numbers as zero (whatever MXCSR says): an fp32 sum below 1.2e-38 is accepted as
// lost. Products are exact and sums fp32, so the error is that of the upcast tiles.
#pragma once

#include "tiles.h"

#if defined(__AVX512BF16__)

namespace svdkern {
namespace {

constexpr int pair_columns = 32;

inline __m512i load_raw(const bf16* p) { return _mm512_loadu_si512(p); }
inline __m512i load_raw(const bf16* p, int64_t n) {  // the first n of 32 elements, the others zero
  const uint32_t mask = n >= 32 ? ~0u : (1u << n) - 1;
  return bit_cast<__m512i>(_mm512_maskz_loadu_epi16(mask, p));
}
inline F multiply_pairs(F sum, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(sum, bit_cast<__m512bh>(a), bit_cast<__m512bh>(b));
}

// As dot_tile; rows of A are readable (and zero) up to a multiple of 32.
template <int I, int J>
inline void dot_tile(F* lanes, const bf16* a, int64_t lda, const bf16* const (&b)[max_j], int64_t column, int64_t n) {
  F acc[I][J];
  for (int i = 0; i < I; ++i)
    for (int j = 0; j < J; ++j) acc[i][j] = lanes[i * max_j + j];
  const auto step = [&](int64_t k, auto load_b) __attribute__((always_inline)) {
    __m512i bv[J];
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) bv[j] = load_b(b[j] + column + k);
#pragma GCC unroll 8
    for (int i = 0; i < I; ++i) {
      const __m512i av = load_raw(a + i * lda + column + k);
#pragma GCC unroll 8
      for (int j = 0; j < J; ++j) acc[i][j] = multiply_pairs(acc[i][j], av, bv[j]);
    }
  };
  int64_t k = 0;
  for (; k + pair_columns <= n; k += pair_columns) step(k, [](const bf16* p) { return load_raw(p); });
  if (k < n) step(k, [tail = n - k](const bf16* p) { return load_raw(p, tail); });
  for (int i = 0; i < I; ++i)
    for (int j = 0; j < J; ++j) lanes[i * max_j + j] = acc[i][j];
}

template <int J>
inline void dot_tiles(F* lanes, const bf16* a, int64_t lda, int rows, const bf16* const (&b)[max_j], int64_t column,
                      int64_t n) {
  int i = 0;
  for (; i + 4 <= rows; i += 4) dot_tile<4, J>(lanes + i * max_j, a + i * lda, lda, b, column, n);
  if (i + 3 == rows) return dot_tile<3, J>(lanes + i * max_j, a + i * lda, lda, b, column, n);
  if (i + 2 <= rows) {
    dot_tile<2, J>(lanes + i * max_j, a + i * lda, lda, b, column, n);
    i += 2;
  }
  if (i < rows) dot_tile<1, J>(lanes + i * max_j, a + i * lda, lda, b, column, n);
}

// One block of 32 columns, `columns` of which exist; `depth` rows of B. a: (depth / 2 rounded up, lda) pairs of rows.
template <int I>
inline void rank_tile(float* c, int64_t ldc, const uint32_t* a, int64_t lda, const bf16* b, int64_t ldb, int64_t depth,
                      int64_t columns, int64_t prefetch) {
  F low[I], high[I];
  for (int i = 0; i < I; ++i) low[i] = load(c + i * ldc), high[i] = load(c + i * ldc + W);
  for (int64_t k = 0; k < depth; k += 2) {
    const bf16* row = b + k * ldb;
    const bool whole = columns == pair_columns;
    const __m512i r0 = whole ? load_raw(row) : load_raw(row, columns);
    const __m512i r1 = k + 1 == depth ? __m512i{} : whole ? load_raw(row + ldb) : load_raw(row + ldb, columns);
    if (prefetch != 0) {
      __builtin_prefetch(row + prefetch);
      __builtin_prefetch(row + ldb + prefetch);
    }
    const __m512i low_pairs = _mm512_maskz_unpacklo_epi16(~0u, r0, r1);
    const __m512i high_pairs = _mm512_maskz_unpackhi_epi16(~0u, r0, r1);
#pragma GCC unroll 8
    for (int i = 0; i < I; ++i) {
      const __m512i av = _mm512_set1_epi32(static_cast<int>(a[k / 2 * lda + i]));
      low[i] = multiply_pairs(low[i], av, low_pairs);
      high[i] = multiply_pairs(high[i], av, high_pairs);
    }
  }
  for (int i = 0; i < I; ++i) store(c + i * ldc, low[i]), store(c + i * ldc + W, high[i]);
}

// As rank_update, C in low/high order, its rows writable up to a multiple of 32.
inline void rank_update(float* c, int64_t ldc, int64_t rows, const uint32_t* a, int64_t lda, const bf16* b, int64_t ldb,
                        int64_t depth, int64_t columns, int64_t prefetch) {
  int64_t i = 0;
  const auto strip = [&](auto height) {
    constexpr int I = height.value;
    for (int64_t col = 0; col < columns; col += pair_columns)
      rank_tile<I>(c + i * ldc + col, ldc, a + i, lda, b + col, ldb, depth,
                   smaller<int64_t>(pair_columns, columns - col), prefetch);
    i += I;
  };
  while (i + 8 <= rows) strip(Width<8>{});
  if (i + 4 <= rows) strip(Width<4>{});
  if (i + 3 == rows) return strip(Width<3>{});
  if (i + 2 <= rows) strip(Width<2>{});
  if (i < rows) strip(Width<1>{});
}

inline void in_order(float* c, int64_t ldc, int64_t rows, int64_t columns) {
  U32 first, second;
  for (int i = 0; i < W; ++i) {
    const int lane = i / 4;  // of 4 columns: low, high, low, high
    first[i] = lane / 2 * 4 + i % 4 + lane % 2 * W;
    second[i] = first[i] + W / 2;
  }
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t col = 0; col < columns; col += pair_columns) {
      float* p = c + i * ldc + col;
      const F low = load(p), high = load(p + W);
      store(p, __builtin_shuffle(low, high, first));
      store(p + W, __builtin_shuffle(low, high, second));
    }
}

}  // namespace
}  // namespace svdkern

#endif
