// The two products with a skinny result.
//
//   contract   out (M, r) = (D*a) F                 a (M, L), F (L, r): one read of a and of F
//   outer      out (L, r) = (D*a)^T q               q (M, r): one read of a, one write of out
//
// contract sums over L in chunks whose bounds depend on L alone, adds the chunks' sums in order, and so gives the same
// bits for any split over threads (which of its two ways a block of rows takes depends on their number). outer sums
// over M in order. D is applied to fp32 values.
#pragma once

#include "factor.h"
#include "parallel.h"
#include "philox.h"
#include "scratch.h"
#include "tiles.h"

namespace svdkern {
namespace {

constexpr int64_t strip = 256;            // columns of `a` that are in L1 as fp32 at a time
constexpr int64_t strip_ld = strip + 16;  // rows 4 KB apart would share their cache sets
static_assert(strip % mask_columns == 0);

inline int64_t chunk_of(int64_t length) { return larger<int64_t>(2 * strip, round_up((length + 15) / 16, strip)); }
inline int64_t chunks_of(int64_t length) { return (length + chunk_of(length) - 1) / chunk_of(length); }

// rows[m][i] = (D*a)[m0 + m][l0 + i] for i < n <= strip, zero from n up to a multiple of W.
template <class T>
inline void load_rows(const Matrix& a, const Dropout& dropout, int64_t m0, int rows, int64_t l0, int64_t n,
                      float* out) {
  for (int m = 0; m < rows; ++m) {
    const T* from = static_cast<const T*>(a.data) + (m0 + m) * a.row_stride + l0;
    float* to = out + m * strip_ld;
    int64_t i = 0;
    for (; i + W <= n; i += W) store(to + i, load(from + i));
    if (i < n) store(to + i, load(from + i, n - i));
    if (dropout.threshold == 0) continue;
    for (int64_t c = 0; c < n; c += mask_columns) {
      alignas(64) float keep[mask_columns];
      mask_row(dropout, m0 + m, l0 + c, keep);
      for (int k = 0; k < mask_columns && c + k < n; k += W)
        store(to + c + k, masked(load(to + c + k), load(keep + k)));
    }
  }
}

// Whether rows of a factor are whole vectors of fp32, to be used where they lie.
template <class AnyMatrix>
inline bool whole_rows(const AnyMatrix& f) {
  return f.dtype == DType::f32 && f.col_stride == 1 && f.cols % W == 0 && f.cols != 0;
}

// to[l][m] (ld = block_rows) = a_rows[m][l] for l < n.
inline void turn(const float* a_rows, int rows, int64_t n, float* to) {
  for (int m = 0; m < rows; m += W)
    for (int64_t l = 0; l < n; l += W) {
      F v[W] = {};
      for (int i = 0; i < smaller<int64_t>(W, rows - m); ++i) v[i] = load(a_rows + (m + i) * strip_ld + l);
      transpose(v);
      for (int i = 0; i < W; ++i) store(to + (l + i) * block_rows + m, v[i]);
    }
}

// contract_block along the factor's rows, `piece` of them to a sum of their own: long chains of additions lose digits.
template <class T>
inline void contract_rows(const Matrix& a, const Dropout& dropout, int64_t m0, int rows, int64_t l0, int64_t l1,
                          const Matrix& f, float* out) {
  constexpr int64_t piece = 64;
  const int64_t r = f.cols;
  Scratch scratch;
  float* sums = scratch.take<float>(rows * r);
  alignas(64) float a_rows[block_rows * strip_ld], turned[block_rows * strip];
  std::memset(out, 0, rows * r * sizeof(float));
  for (int64_t l = l0; l < l1; l += strip) {
    const int64_t n = smaller(strip, l1 - l);
    load_rows<T>(a, dropout, m0, rows, l, n, a_rows);
    if (rows > 1) turn(a_rows, rows, n, turned);
    const int64_t ld = rows > 1 ? block_rows : 1;
    for (int64_t k = 0; k < n; k += piece) {
      std::memset(sums, 0, rows * r * sizeof(float));
      rank_update(sums, r, rows, (rows > 1 ? turned : a_rows) + k * ld, ld,
                  static_cast<const float*>(f.data) + (l + k) * f.row_stride, f.row_stride, smaller(piece, n - k), r);
      for (int64_t i = 0; i < rows * r; i += W) store(out + i, load(out + i) + load(sums + i));
    }
  }
}

// out[m][j] (ld = r) = (D*a)[m0 + m][l0 ... l1] . F[l0 ... l1][j] for `rows` <= block_rows rows.
template <class T>
inline void contract_block(const Matrix& a, const Dropout& dropout, int64_t m0, int rows, int64_t l0, int64_t l1,
                           const Matrix& f, float* out) {
  const int64_t r = f.cols, tiles = (r + panel_columns - 1) / panel_columns;
  if (whole_rows(f) && rows * r >= 8 * W) return contract_rows<T>(a, dropout, m0, rows, l0, l1, f, out);
  constexpr int tile_lanes = block_rows * panel_columns;
  Scratch scratch;
  F* lanes = scratch.take<F>(tiles * tile_lanes);
  std::memset(lanes, 0, tiles * tile_lanes * sizeof(F));
  alignas(64) float a_rows[block_rows * strip_ld], buffer[panel_columns * strip_ld];
  for (int64_t l = l0; l < l1; l += strip) {
    const int64_t n = smaller(strip, l1 - l);
    load_rows<T>(a, dropout, m0, rows, l, n, a_rows);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t j0 = tile * panel_columns, columns = smaller<int64_t>(panel_columns, r - j0);
      const Panel panel = load_panel(f, l, n, j0, columns, buffer, strip_ld);
      with_dot_width(rows, [&](auto width) {
        constexpr int J = width.value;
        for (int64_t j = 0; j < columns; j += J) {
          const float* b[max_j] = {};
          for (int i = 0; i < J; ++i) b[i] = panel.data + smaller(j + i, columns - 1) * panel.ld;
          // a tile's lanes: [j / max_j][row][j % max_j]
          F* group = lanes + tile * tile_lanes + (j / max_j) * block_rows * max_j + j % max_j;
          dot_tiles<float, J>(group, a_rows, strip_ld, rows, b, 0, round_up(n, W));
        }
      });
    }
  }
  for (int m = 0; m < rows; ++m)
    for (int64_t j = 0; j < r; ++j) {
      const int64_t within = j % panel_columns;
      out[m * r + j] = sum(
          lanes[j / panel_columns * tile_lanes + (within / max_j) * block_rows * max_j + m * max_j + within % max_j]);
    }
}

// The chunks' sums, (chunks, M, r), added in order into out (M, r).
inline void add_chunks(const float* partial, int64_t chunks, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) {
    float total = 0.0f;
    for (int64_t c = 0; c < chunks; ++c) total += partial[c * count + i];
    out[i] = total;
  }
}

// out[l][j] = sum_m (D*a)[m][l] q[m][j] for l0 <= l < l1; q (M, r) contiguous fp32.
template <class T>
inline void outer_range(const Matrix& a, const Dropout& dropout, const float* q, const MutableMatrix& out, int64_t l0,
                        int64_t l1) {
  const int64_t r = out.cols;
  const bool in_place = whole_rows(out);
  Scratch scratch;
  float* panel = scratch.take<float>(in_place ? 0 : r * strip_ld);
  alignas(64) float a_rows[block_rows * strip_ld];
  for (int64_t l = l0; l < l1; l += strip) {
    const int64_t n = smaller(strip, l1 - l);
    if (in_place) {
      float* to = static_cast<float*>(out.data) + l * out.row_stride;
      for (int64_t i = 0; i < n; ++i) std::memset(to + i * out.row_stride, 0, r * sizeof(float));
      for (int64_t m0 = 0; m0 < a.rows; m0 += block_rows) {
        const int rows = static_cast<int>(smaller<int64_t>(block_rows, a.rows - m0));
        load_rows<T>(a, dropout, m0, rows, l, n, a_rows);
        rank_update(to, out.row_stride, n, a_rows, strip_ld, q + m0 * r, r, rows, r);
      }
      continue;
    }
    std::memset(panel, 0, r * strip_ld * sizeof(float));
    for (int64_t m0 = 0; m0 < a.rows; m0 += block_rows) {
      const int rows = static_cast<int>(smaller<int64_t>(block_rows, a.rows - m0));
      load_rows<T>(a, dropout, m0, rows, l, n, a_rows);
      rank_update(panel, strip_ld, r, q + m0 * r, r, a_rows, strip_ld, rows, round_up(n, W));
    }
    for (int64_t j0 = 0; j0 < r; j0 += panel_columns)
      store_panel(out, l, n, j0, smaller<int64_t>(panel_columns, r - j0), panel + j0 * strip_ld, strip_ld);
  }
}

}  // namespace
}  // namespace svdkern
