// y (M, out) = a (M, in) w (in, out) + D*(z F^T) + bias, one rounding; w streamed once for all rows of a block.
//
//   in-contiguous w  (weight.t() of an nn.Linear: the forward)   dots: a few w columns at a time, read whole
//   out-contiguous w (its weight: the gradient of x)             rank: row groups over strips of columns in L1 or L2
//
// From 5 rows on tiles (AMX) or the rows as lanes (row_lanes.h) take over.
//
// Work is split over `out`; an output is the same sum in the same order however that is done.
// Floor: one read of w at memory bandwidth, up to about M = 8 where the multiply-adds take over.
#pragma once

#include "amx_tiles.h"
#include "factor.h"
#include "parallel.h"
#include "philox.h"
#include "row_lanes.h"
#include "scratch.h"

namespace svdkern {
namespace {

constexpr int64_t unit = 64;            // outputs in one piece of work, and columns of one factor panel
constexpr int64_t dots_depth = 64;      // elements of each of 6 or 8 w columns at a time,
constexpr int64_t dots_ahead = 256;     // while those so much further on are fetched
constexpr int64_t rank_columns = 1024;  // outputs whose sums are in cache, of up to block_rows rows (tiles, no base)
constexpr int64_t rank_depth = 8;       // rows of w in one pass over those sums
constexpr int few = 4;                  // rows of `a` up to which memory is the limit
constexpr int64_t few_rank_columns = 4 * rank_columns;  // of few rows: memory is read in runs as long as can be
constexpr int64_t dots_piece = 3 * unit;   // outputs at a time of rows as lanes: whole tiles but for the last piece
constexpr int64_t rank_floats = 32 << 10;  // about so many sums: they stay in L2, and w is read in long runs
constexpr int64_t sums_size = block_rows * (rank_columns + 16);
static_assert(unit == mask_columns && dots_piece % dots_outputs == 0 && few * (few_rank_columns + 16) <= sums_size);

// What `a` is kept as for a row each or a column each: fp32, or for bf16 products bf16 and pairs along k.
template <class T>
struct Operand {
  static constexpr bool bf16_products = false;
  using Row = float;
  using Column = float;
  static constexpr int row_multiple = W, depth = 1;
};
#if defined(__AVX512BF16__)
template <>
struct Operand<bf16> {
  static constexpr bool bf16_products = true;
  using Row = bf16;
  using Column = uint32_t;
  static constexpr int row_multiple = 32, depth = 2;
};
#endif

template <class T>
struct Linear {
  using Row = typename Operand<T>::Row;
  using Column = typename Operand<T>::Column;
  int64_t rows = 0, in = 0, out = 0;
  // the base: w == nullptr for none
  const T* w = nullptr;
  int64_t w_in = 0, w_out = 0;  // strides
  // `a` as one of
  const Row* a = nullptr;  // (M, in), zero from `in` up to a multiple of row_multiple
  int64_t lda = 0;
  const Column* at = nullptr;       // (in / depth, M)
  const float* lanes_at = nullptr;  // (in, lanes), zero from M on
  // the adapter, scale included: one of the two, or none
  const float* zt = nullptr;  // (r, M)
  const float* z = nullptr;   // (M, r): F is used row by row
  Matrix f;                   // (out, r)
  Dropout dropout;
  Vector bias;
  T* y = nullptr;
  int64_t ldy = 0;

  bool dots() const { return w_in == 1; }
#if defined(__AMX_BF16__)
  bool tiles() const { return Operand<T>::bf16_products && rows >= least_amx_rows; }
#else
  static constexpr bool tiles() { return false; }
#endif
  bool row_lanes() const { return rows > few && !tiles(); }
  // Tiles take pairs for dots and rows for rank, the registers of few rows the other way round.
  bool by_rows() const { return !row_lanes() && dots() != tiles(); }
  int64_t lanes() const { return round_up(rows, W); }
};

// sums[m][o - o0] = a[m] . w[:, o] for o0 <= o < o0 + n, n <= unit.
template <class T>
inline void base_by_dots(const Linear<T>& job, [[maybe_unused]] int64_t m0, int rows, int64_t o0, int64_t n,
                         float* sums, int64_t ld) {
#if defined(__AMX_BF16__)
  if constexpr (Operand<T>::bf16_products)
    if (job.tiles())
      return amx_dots(job.w + o0 * job.w_out, job.w_out, job.at + m0, job.rows, rows, job.in, n, sums, ld);
#endif
  const auto with_width = [&](auto width) {
    constexpr int J = width.value, streams = max_j / J * J;  // columns of w read side by side
    for (int64_t o = 0; o < n; o += streams) {
      F lanes[few * max_j] = {};
      const auto column = [&](int64_t j) { return job.w + (o0 + smaller(o + j, n - 1)) * job.w_out; };
      for (int64_t k = 0; k < job.in; k += dots_depth) {
        const int64_t deep = smaller(dots_depth, job.in - k), later = k + dots_ahead;
        for (int64_t j = 0; j < streams; ++j)
          fetch(later < job.in ? column(j) + later : column(j + streams) + (later - job.in), deep);
        for (int j0 = 0; j0 < streams; j0 += J) {
          const T* b[max_j] = {};
          for (int j = 0; j < J; ++j) b[j] = column(j0 + j) + k;
          if constexpr (Operand<T>::bf16_products)
            dot_tiles<J>(lanes + j0, job.a + k, job.lda, rows, b, 0, deep);
          else
            dot_tiles<T, J>(lanes + j0, job.a + k, job.lda, rows, b, 0, deep);
        }
      }
      for (int m = 0; m < rows; ++m)
        for (int64_t j = 0; j < smaller<int64_t>(streams, n - o); ++j) sums[m * ld + o + j] = sum(lanes[m * max_j + j]);
    }
  };
  if (rows == 1) return with_width(Width<8>{});
  if (rows == 2 || many_registers) return with_width(Width<4>{});
  with_width(Width<3>{});
}

template <class T>
inline void base_by_rank(const Linear<T>& job, int64_t m0, int rows, int64_t o0, int64_t n, float* sums, int64_t ld) {
#if defined(__AMX_BF16__)
  if constexpr (Operand<T>::bf16_products)
    if (job.tiles()) {
      amx_rank(job.w + o0, job.w_in, job.a + m0 * job.lda, job.lda, rows, job.in, n, sums, ld);
      return in_order(sums, ld, rows, n);
    }
#endif
  for (int64_t k = 0; k < job.in; k += rank_depth) {
    const int64_t depth = smaller(rank_depth, job.in - k),
                  ahead = k + 2 * rank_depth <= job.in ? rank_depth * job.w_in : 0;
    const auto* at = job.at + k / Operand<T>::depth * job.rows + m0;
    rank_update(sums, ld, rows, at, job.rows, job.w + k * job.w_in + o0, job.w_in, depth, n, ahead);
  }
#if defined(__AVX512BF16__)
  if constexpr (Operand<T>::bf16_products) in_order(sums, ld, rows, n);
#endif
}

// sums += D*(z F^T) for n <= unit outputs from o0 on.
template <class T>
inline void add_adapter(const Linear<T>& job, int64_t m0, int rows, int64_t o0, int64_t n, float* sums,
                        int64_t sums_ld) {
  if (job.zt == nullptr && job.z == nullptr) return;
  alignas(64) float buffer[panel_columns * unit], branch[block_rows * unit];
  const bool drops = job.dropout.threshold != 0;
  float* to = drops ? branch : sums;
  const int64_t ld = drops ? unit : sums_ld, wide = round_up(n, W);
  if (drops) std::memset(branch, 0, sizeof(branch));
  if (job.z != nullptr) {
    for (int64_t i = 0; i < n; i += 4) {
      const float* f[max_j] = {};
      for (int64_t j = 0; j < 4; ++j)
        f[j] = static_cast<const float*>(job.f.data) + (o0 + smaller(i + j, n - 1)) * job.f.row_stride;
      F lanes[block_rows * max_j] = {};
      dot_tiles<float, 4>(lanes, job.z + m0 * job.f.cols, job.f.cols, rows, f, 0, job.f.cols);
      for (int m = 0; m < rows; ++m)
        for (int64_t j = 0; j < smaller<int64_t>(4, n - i); ++j) to[m * ld + i + j] += sum(lanes[m * max_j + j]);
    }
  }
  for (int64_t j0 = 0; job.z == nullptr && j0 < job.f.cols; j0 += panel_columns) {
    const int64_t columns = smaller<int64_t>(panel_columns, job.f.cols - j0);
    const Panel panel = load_panel(job.f, o0, n, j0, columns, buffer, unit);
    rank_update(to, ld, rows, job.zt + j0 * job.rows + m0, job.rows, panel.data, panel.ld, columns, wide);
  }
  if (!drops) return;
  for (int m = 0; m < rows; ++m) {
    alignas(64) float keep[unit];
    mask_row(job.dropout, m0 + m, o0, keep);
    for (int64_t i = 0; i < wide; i += W) {
      float* s = sums + m * sums_ld + i;
      store(s, load(s) + masked(load(branch + m * unit + i), load(keep + i)));
    }
  }
}

template <class T>
inline void write_out(const Linear<T>& job, int64_t m0, int rows, int64_t o0, int64_t n, const float* sums,
                      int64_t ld) {
  alignas(64) float bias[unit] = {};
  const T* b = static_cast<const T*>(job.bias.data);
  if (b != nullptr)
    for (int64_t i = 0; i < n; ++i) bias[i] = to_float(b[(o0 + i) * job.bias.stride]);
  for (int m = 0; m < rows; ++m) {
    T* y = job.y + (m0 + m) * job.ldy + o0;
    const float* s = sums + m * ld;
    int64_t i = 0;
    for (; i + W <= n; i += W) store(y + i, load(s + i) + load(bias + i));
    if (i < n) store(y + i, load(s + i) + load(bias + i), n - i);
  }
}

// Outputs o0 ... o1 of all rows, which are the lanes.
template <class T>
inline void lanes_range(const Linear<T>& job, int64_t o0, int64_t o1) {
  if (o0 == o1) return;
  constexpr int64_t ld = unit + 16;
  const int64_t lanes = job.lanes(), most = rank_floats / lanes, pieces = (o1 - o0 + most - 1) / most;
  const int64_t step = job.dots() ? dots_piece : round_up((o1 - o0 + pieces - 1) / pieces, unit);  // equal runs of w
  Scratch scratch;
  float* c = scratch.take<float>((step + lane_sums + W) * lanes);
  for (int64_t o = o0; o < o1; o += step) {
    const int64_t n = smaller(step, o1 - o);
    std::memset(c, 0, (n + lane_sums + W) * lanes * sizeof(float));
    const auto product = [&](auto outputs) {
      constexpr int J = outputs.value;
      if (!job.dots()) return lanes_by_rank<J>(job.w + o, job.w_in, job.in, n, job.lanes_at, lanes, c);
      for (int64_t i = 0; i < n; i += dots_outputs)
        lanes_by_dots<J>(job.w + (o + i) * job.w_out, job.w_out, job.in, smaller(dots_outputs, n - i), job.lanes_at,
                         lanes, c + i * lanes);
    };
    lanes == W ? product(Width<lane_sums>{}) : product(Width<lane_sums / 2>{});
    for (int64_t i = 0; i < n; i += unit) {
      const int64_t wide = smaller(unit, n - i);
      for (int64_t m0 = 0; m0 < job.rows; m0 += block_rows) {
        alignas(64) float sums[block_rows * ld];
        const int rows = static_cast<int>(smaller<int64_t>(block_rows, job.rows - m0));
        for (int64_t l = 0; l < wide; l += W)
          for (int m = 0; m < rows; m += W) {
            F v[W];
            for (int q = 0; q < W; ++q) v[q] = load(c + (i + l + q) * lanes + m0 + m);
            transpose(v);
            for (int q = 0; q < W; ++q) store(sums + (m + q) * ld + l, v[q]);
          }
        add_adapter(job, m0, rows, o + i, wide, sums, ld);
        write_out(job, m0, rows, o + i, wide, sums, ld);
      }
    }
  }
}

// Outputs o0 ... o1 of all rows.
template <class T>
inline void linear_range(const Linear<T>& job, int64_t o0, int64_t o1) {
  if (job.w != nullptr && job.row_lanes()) return lanes_range(job, o0, o1);
  alignas(64) float sums[sums_size];
  const bool dots = job.w != nullptr && job.dots();
  const int64_t piece = dots ? unit : job.rows <= few ? few_rank_columns : rank_columns, ld = piece + 16;
  for (int64_t o = o0; o < o1; o += piece) {
    const int64_t n = smaller(piece, o1 - o);
    for (int64_t m0 = 0; m0 < job.rows; m0 += block_rows) {
      const int rows = static_cast<int>(smaller<int64_t>(block_rows, job.rows - m0));
      if (!dots)
        for (int m = 0; m < rows; ++m) std::memset(sums + m * ld, 0, round_up(n, 2 * W) * sizeof(float));
      if (dots)
        base_by_dots(job, m0, rows, o, n, sums, ld);
      else if (job.w != nullptr)
        base_by_rank(job, m0, rows, o, n, sums, ld);
      for (int64_t i = 0; i < n; i += unit) {
        const int64_t wide = smaller(unit, n - i);
        add_adapter(job, m0, rows, o + i, wide, sums + i, ld);
        write_out(job, m0, rows, o + i, wide, sums + i, ld);
      }
    }
  }
}

// The operand `a` as the base wants it, in parts: take_operand reserves, fill_operand converts columns l0 ... l1 (l0
// a multiple of a strip).
template <class T>
inline void take_operand(Linear<T>& job, const Matrix& a, Scratch& scratch) {
  using Row = typename Linear<T>::Row;
  if (job.w == nullptr) return;
  if (job.row_lanes()) {
    job.lanes_at = scratch.take<float>(job.in * job.lanes());
  } else if (!job.by_rows()) {
    job.at = scratch.take<typename Linear<T>::Column>((job.in + 1) / Operand<T>::depth * job.rows);
  } else if (sizeof(Row) == sizeof(T) && job.in % Operand<T>::row_multiple == 0) {
    job.a = static_cast<const Row*>(a.data);
    job.lda = a.row_stride;
  } else {
    job.lda = round_up(job.in, Operand<T>::row_multiple) + 16;
    job.a = scratch.take<Row>(job.rows * job.lda);
  }
}

template <class T>
inline void fill_rows(const Linear<T>& job, const Matrix& a, int64_t l0, int64_t l1) {
  for (int64_t m = 0; m < job.rows; ++m) {
    const T* from = static_cast<const T*>(a.data) + m * a.row_stride;
    auto* to = const_cast<typename Linear<T>::Row*>(job.a) + m * job.lda;
    if constexpr (Operand<T>::bf16_products) {
      std::memcpy(to + l0, from + l0, (l1 - l0) * sizeof(T));
      if (l1 == job.in) std::memset(to + l1, 0, (round_up(l1, 32) - l1) * sizeof(T));
    } else {
      widen(from + l0, l1 - l0, to + l0);
    }
  }
}

template <class T>
inline void fill_columns(const Linear<T>& job, const Matrix& a, int64_t l0, int64_t l1) {
  for (int64_t m = 0; m < job.rows; ++m) {
    const T* from = static_cast<const T*>(a.data) + m * a.row_stride;
    auto* to = const_cast<typename Linear<T>::Column*>(job.at) + m;
    if constexpr (Operand<T>::bf16_products)
      for (int64_t l = l0; l < l1; l += 2)
        to[l / 2 * job.rows] = from[l].bits | (l + 1 < l1 ? static_cast<uint32_t>(from[l + 1].bits) << 16 : 0);
    else
      for (int64_t l = l0; l < l1; ++l) to[l * job.rows] = to_float(from[l]);
  }
}

template <class T>
inline void fill_lanes(const Linear<T>& job, const Matrix& a, int64_t l0, int64_t l1) {
  const int64_t lanes = job.lanes();
  for (int64_t l = l0; l < l1; l += W) {
    const int64_t deep = smaller<int64_t>(W, l1 - l);
    for (int64_t m = 0; m < lanes; m += W) {
      F v[W] = {};
      for (int64_t i = 0; i < smaller<int64_t>(W, job.rows - m); ++i) {
        const T* from = static_cast<const T*>(a.data) + (m + i) * a.row_stride + l;
        v[i] = deep == W ? load(from) : load(from, deep);
      }
      transpose(v);
      for (int64_t i = 0; i < deep; ++i) store(const_cast<float*>(job.lanes_at) + (l + i) * lanes + m, v[i]);
    }
  }
}

template <class T>
inline void fill_operand(const Linear<T>& job, const Matrix& a, int64_t l0, int64_t l1) {
  if (job.w == nullptr || job.a == a.data) return;
  job.row_lanes() ? fill_lanes(job, a, l0, l1)
  : job.by_rows() ? fill_rows(job, a, l0, l1)
                  : fill_columns(job, a, l0, l1);
}

}  // namespace
}  // namespace svdkern
