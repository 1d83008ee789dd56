// What the packed product of gemm.h is made of on one instruction set: two packed layouts and a register tile.
//
//   packed a   strips of tile_rows rows,       [k][row]        packed b   panels of tile_columns columns, [k][column]
//   tile       C (tile_rows, tile_columns) += strip . panel, fp32, in registers over k
//
// An Element holds `per_element` consecutive k of one row or column; k is a multiple of `depth`, padded with zeros, as
// are rows and columns that do not exist. Fma converts to fp32 while packing, whatever the storage type; Pairs and
// Tiles (bf16 only) keep bf16, rounding fp32 factors once. An element of C is the same sum in the same order wherever
// it stands.
#pragma once

#include "amx_tiles.h"
#include "tiles.h"

namespace svdkern {
namespace {

// An operand of a product, (k, n) with any strides.
struct Operand2d {
  const void* data = nullptr;
  DType dtype = DType::f32;
  int64_t k_stride = 0, n_stride = 0;
};
inline Operand2d by_rows(const Matrix& m) { return {m.data, m.dtype, m.row_stride, m.col_stride}; }
inline Operand2d by_columns(const Matrix& m) { return {m.data, m.dtype, m.col_stride, m.row_stride}; }

struct Fma {
  using Element = float;
  static constexpr int64_t tile_rows = W == 16 ? 14 : 6, tile_columns = 2 * W, depth = 1, per_element = 1;
  static constexpr int64_t block_depth = W == 16 ? 96 : 256;  // of a panel: stays in L1 while the strips pass
  static constexpr int64_t a_slack = W;                       // elements written beyond a strip
  static constexpr int64_t few_rows = 64;                     // up to which w is streamed, see primitives.h (measured)
  // Beyond so many rows, to pass them more often costs more than reading w in longer runs gains (measured).
  static constexpr int64_t most_rows_of_deep_pieces = 512;
  struct Session {};

  // out[k][i] = a[i][k] for i < rows; other rows zero.
  template <class S>
  static void pack_a(const S* a, int64_t row_stride, int64_t rows, int64_t k, float* out) {
    constexpr int parts = (tile_rows + W - 1) / W;
    for (int64_t k0 = 0; k0 < k; k0 += W) {
      const int64_t n = smaller<int64_t>(W, k - k0);
      F v[parts][W] = {};
      for (int i = 0; i < rows; ++i) {
        const S* p = a + i * row_stride + k0;
        v[i / W][i % W] = n == W ? load(p) : load(p, n);
      }
      for (int part = 0; part < parts; ++part) transpose(v[part]);
      for (int64_t j = 0; j < n; ++j)  // a vector that is too wide is overwritten by the next one
        for (int part = 0; part < parts; ++part) store(out + (k0 + j) * tile_rows + part * W, v[part][j]);
    }
  }

  // out[k][j] = b[k0 + k][n0 + j] for j < columns; other columns zero.
  template <class S>
  static void pack_b(const Operand2d& b, int64_t k0, int64_t k, int64_t n0, int64_t columns, float* out) {
    const S* p = static_cast<const S*>(b.data) + k0 * b.k_stride + n0 * b.n_stride;
    if (b.n_stride == 1 && columns == tile_columns) {
      for (int64_t i = 0; i < k; ++i) {
        const S* row = p + i * b.k_stride;
        __builtin_prefetch(row + tile_columns);  // of the next panel
        for (int j = 0; j < tile_columns; j += W) store(out + i * tile_columns + j, load(row + j));
      }
    } else if (b.k_stride == 1) {
      for (int64_t j = 0; j < tile_columns; j += W)
        for (int64_t i = 0; i < k; i += W) {
          const int64_t n = smaller<int64_t>(W, k - i), wide = smaller<int64_t>(W, columns - j);
          F v[W] = {};
          for (int c = 0; c < wide; ++c) {
            const S* run = p + (j + c) * b.n_stride + i;
            v[c] = n == W ? load(run) : load(run, n);
          }
          transpose(v);
          for (int r = 0; r < n; ++r) store(out + (i + r) * tile_columns + j, v[r]);
        }
    } else {
      for (int64_t i = 0; i < k; ++i)
        for (int64_t j = 0; j < tile_columns; ++j)
          out[i * tile_columns + j] = j < columns ? to_float(p[i * b.k_stride + j * b.n_stride]) : 0.0f;
    }
  }

  template <int V>
  static void tile_of(const float* a, const float* b, int64_t k, float* c, int64_t ldc, bool first) {
    F acc[tile_rows][V];
#pragma GCC unroll 16
    for (int i = 0; i < tile_rows; ++i)
      for (int v = 0; v < V; ++v) acc[i][v] = first ? F{} : load(c + i * ldc + v * W);
    for (int64_t l = 0; l < k; ++l) {
      F bv[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) bv[v] = load(b + l * tile_columns + v * W);
#pragma GCC unroll 16
      for (int i = 0; i < tile_rows; ++i) {
        const F av = splat(a[l * tile_rows + i]);
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) acc[i][v] += av * bv[v];
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < tile_rows; ++i)
      for (int v = 0; v < V; ++v) store(c + i * ldc + v * W, acc[i][v]);
  }
  // half: only the first half of the panel's columns is wanted.
  static void tile(const float* a, const float* b, int64_t k, float* c, int64_t ldc, bool first, bool half) {
    half ? tile_of<1>(a, b, k, c, ldc, first) : tile_of<2>(a, b, k, c, ldc, first);
  }
};

#if defined(__AVX512BF16__)

// 32 consecutive elements as bf16, those from n on zero.
inline __m512i load_rounded(const bf16* p, int64_t n) { return n >= pair_columns ? load_raw(p) : load_raw(p, n); }
template <class S>
inline __m512i load_rounded(const S* p, int64_t n) {
  F low, high = {};
  if (n >= pair_columns) {
    low = load(p), high = load(p + W);
  } else {
    low = load(p, smaller<int64_t>(n, W));
    if (n > W) high = load(p + W, n - W);
  }
  return bit_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
}

// bf16 pairs along k, multiplied by vdpbf16ps.
struct Pairs {
  using Element = uint32_t;
  static constexpr int64_t tile_rows = 14, tile_columns = 32, depth = 2, per_element = 2;
  static constexpr int64_t block_depth = 512, a_slack = W, few_rows = 32, most_rows_of_deep_pieces = 512;
  struct Session {};

  template <class S>
  static void pack_a(const S* a, int64_t row_stride, int64_t rows, int64_t k, uint32_t* out) {
    for (int64_t k0 = 0; k0 < k; k0 += 2 * W) {
      F v[W] = {};
      for (int i = 0; i < rows; ++i) v[i] = bit_cast<F>(load_rounded(a + i * row_stride + k0, k - k0));
      transpose(v);
      for (int64_t j = 0; j < smaller<int64_t>(W, (k - k0 + 1) / 2); ++j)
        store(reinterpret_cast<float*>(out) + (k0 / 2 + j) * tile_rows, v[j]);
    }
  }

  template <class S>
  static void pack_b(const Operand2d& b, int64_t k0, int64_t k, int64_t n0, int64_t columns, uint32_t* out) {
    const S* p = static_cast<const S*>(b.data) + k0 * b.k_stride + n0 * b.n_stride;
    if (b.n_stride == 1) {
      // quarters of a row changed round so that unpacking two rows gives columns in order
      const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
      for (int64_t i = 0; i < k; i += 2) {
        const S* row = p + i * b.k_stride;
        __builtin_prefetch(row + tile_columns);  // of the next panel
        __builtin_prefetch(row + b.k_stride + tile_columns);
        const __m512i r0 = load_rounded(row, columns);
        const __m512i r1 = i + 1 < k ? load_rounded(row + b.k_stride, columns) : __m512i{};
        const __m512i q0 = _mm512_maskz_permutexvar_epi64(0xff, order, r0);
        const __m512i q1 = _mm512_maskz_permutexvar_epi64(0xff, order, r1);
        _mm512_storeu_si512(out + i / 2 * tile_columns, _mm512_maskz_unpacklo_epi16(~0u, q0, q1));
        _mm512_storeu_si512(out + i / 2 * tile_columns + W, _mm512_maskz_unpackhi_epi16(~0u, q0, q1));
      }
    } else if (b.k_stride == 1) {
      for (int64_t j = 0; j < tile_columns; j += W)
        for (int64_t i = 0; i < k; i += 2 * W) {
          F v[W] = {};
          for (int c = 0; c < smaller<int64_t>(W, columns - j); ++c)
            v[c] = bit_cast<F>(load_rounded(p + (j + c) * b.n_stride + i, k - i));
          transpose(v);
          for (int64_t r = 0; r < smaller<int64_t>(W, (k - i + 1) / 2); ++r)
            store(reinterpret_cast<float*>(out) + (i / 2 + r) * tile_columns + j, v[r]);
        }
    } else {
      for (int64_t i = 0; i < k; i += 2)
        for (int64_t j = 0; j < tile_columns; ++j) {
          bf16 pair[2] = {};
          for (int h = 0; h < 2; ++h)
            if (j < columns && i + h < k) from_float(pair + h, to_float(p[(i + h) * b.k_stride + j * b.n_stride]));
          out[i / 2 * tile_columns + j] = bit_cast<uint32_t>(pair);
        }
    }
  }

  template <int V>
  static void tile_of(const uint32_t* a, const uint32_t* b, int64_t k, float* c, int64_t ldc, bool first) {
    F acc[tile_rows][V];
#pragma GCC unroll 16
    for (int i = 0; i < tile_rows; ++i)
      for (int v = 0; v < V; ++v) acc[i][v] = first ? F{} : load(c + i * ldc + v * W);
    for (int64_t l = 0; l < k / 2; ++l) {
      __m512i bv[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) bv[v] = _mm512_loadu_si512(b + l * tile_columns + v * W);
#pragma GCC unroll 16
      for (int i = 0; i < tile_rows; ++i) {
        const __m512i av = _mm512_set1_epi32(static_cast<int>(a[l * tile_rows + i]));
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) acc[i][v] = multiply_pairs(acc[i][v], av, bv[v]);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < tile_rows; ++i)
      for (int v = 0; v < V; ++v) store(c + i * ldc + v * W, acc[i][v]);
  }
  static void tile(const uint32_t* a, const uint32_t* b, int64_t k, float* c, int64_t ldc, bool first, bool half) {
    half ? tile_of<1>(a, b, k, c, ldc, first) : tile_of<2>(a, b, k, c, ldc, first);
  }
};

#endif
#if defined(__AMX_BF16__)

// The same panels on AMX tiles; a strip is [k / 32][row][32].
struct Tiles : Pairs {
  static constexpr int64_t tile_rows = 32, depth = 32, block_depth = 320, a_slack = 0;
  static constexpr int64_t few_rows = 16, most_rows_of_deep_pieces = 160;

  struct Session : TileSession {
    Session() : TileSession(shapes()) {}
    static TileShapes shapes() {
      TileShapes all;
      for (int tile = 0; tile < 8; ++tile) all.set(tile, 16, 64);
      return all;
    }
  };

  template <class S>
  static void pack_a(const S* a, int64_t row_stride, int64_t rows, int64_t k, uint32_t* out) {
    for (int64_t i = 0; i < tile_rows; ++i)
      for (int64_t k0 = 0; k0 < k; k0 += depth)
        _mm512_storeu_si512(out + k0 / 2 * tile_rows + i * W,
                            i < rows ? load_rounded(a + i * row_stride + k0, k - k0) : __m512i{});
  }

  template <class S>
  static void pack_b(const Operand2d& b, int64_t k0, int64_t k, int64_t n0, int64_t columns, uint32_t* out) {
    Pairs::pack_b<S>(b, k0, k, n0, columns, out);
    const int64_t pairs = (k + 1) / 2, whole = round_up(k, depth) / 2;
    std::memset(out + pairs * tile_columns, 0, (whole - pairs) * tile_columns * sizeof(uint32_t));
  }

  static void tile(const uint32_t* a, const uint32_t* b, int64_t k, float* c, int64_t ldc, bool first, bool half) {
    constexpr int64_t row_bytes = 4 * W, pair_bytes = 4 * tile_columns;
    float* c1 = c + 16 * ldc;
    if (half) {
      first ? tile_zero<0>() : tile_load<0>(c, 4 * ldc);
      first ? tile_zero<2>() : tile_load<2>(c1, 4 * ldc);
      for (int64_t l = 0; l < k; l += depth, a += depth / 2 * tile_rows, b += depth / 2 * tile_columns) {
        tile_load<6>(b, pair_bytes);
        tile_load<4>(a, row_bytes);
        tile_multiply<0, 4, 6>();
        tile_load<5>(a + 16 * W, row_bytes);
        tile_multiply<2, 5, 6>();
      }
      tile_store<0>(c, 4 * ldc);
      tile_store<2>(c1, 4 * ldc);
      return;
    }
    if (first) {
      tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    } else {
      tile_load<0>(c, 4 * ldc), tile_load<1>(c + 16, 4 * ldc);
      tile_load<2>(c1, 4 * ldc), tile_load<3>(c1 + 16, 4 * ldc);
    }
    for (int64_t l = 0; l < k; l += depth, a += depth / 2 * tile_rows, b += depth / 2 * tile_columns) {
      tile_load<4>(a, row_bytes);
      tile_load<6>(b, pair_bytes);
      tile_multiply<0, 4, 6>();
      tile_load<7>(b + 16, pair_bytes);
      tile_multiply<1, 4, 7>();
      tile_load<5>(a + 16 * W, row_bytes);
      tile_multiply<2, 5, 6>();
      tile_multiply<3, 5, 7>();
    }
    tile_store<0>(c, 4 * ldc), tile_store<1>(c + 16, 4 * ldc);
    tile_store<2>(c1, 4 * ldc), tile_store<3>(c1 + 16, 4 * ldc);
  }
};

#endif

template <class T>
struct EngineOf {
  using Type = Fma;
};
#if defined(__AMX_BF16__)
template <>
struct EngineOf<bf16> {
  using Type = Tiles;
};
#elif defined(__AVX512BF16__)
template <>
struct EngineOf<bf16> {
  using Type = Pairs;
};
#endif

}  // namespace
}  // namespace svdkern
