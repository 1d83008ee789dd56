// y (M, out) = a (M, in) w (in, out) + D*(z F^T) + bias, one rounding; w streamed once for all rows of a block.
//
//   in-contiguous w  (weight.t() of an nn.Linear: the forward)   dots: a few w columns at a time, read whole
//   out-contiguous w (its weight: the gradient of x)             rank: row groups over column strips that stay in L1 or
//   L2
//
// Work is split over `out`; an output is the same sum in the same order however that is done.
// Floor: one read of w at memory bandwidth, up to about M = 10 (fp32) where the multiply-adds take over.
#pragma once

#include "amx_tiles.h"
#include "factor.h"
#include "parallel.h"
#include "philox.h"
#include "scratch.h"
#include "tiles.h"

namespace svdkern {
namespace {

constexpr int64_t unit = 64;            // outputs in one piece of work, and columns of one factor panel
constexpr int64_t dots_depth = 1024;    // elements of each w column read before the next block of rows goes over them
constexpr int64_t rank_columns = 1024;  // outputs whose sums are in cache: w is read in runs of at least 2 KB
constexpr int64_t rank_depth = 8;       // rows of w in one pass over those sums
constexpr int few = 4;                  // rows of `a` up to which memory is the limit: beyond, caches are shared out
constexpr int64_t held_outputs = 16;    // dots of many rows: outputs whose lanes stay in L1 with a part of the rows
constexpr int64_t part_depth = 256;     // that part
constexpr int64_t part_columns = 256;   // rank of many rows: columns of w that are widened at once, part_rows of them
constexpr int64_t part_rows = 16;
constexpr int64_t few_rank_columns = 4 * rank_columns;  // of few rows: memory is read in runs as long as can be
constexpr int64_t sums_size = block_rows * (rank_columns + 16);
static_assert(unit == mask_columns && few * (few_rank_columns + 16) <= sums_size);

// What `a` is kept as: fp32, or for bf16 products bf16 rows (dots) and pairs of rows (rank).
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
  const Row* a = nullptr;       // dots: (M, in), zero from `in` up to a multiple of row_multiple
  int64_t lda = 0;
  const Column* at = nullptr;  // rank: (in / depth, M)
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
  // Tiles take pairs for dots and rows for rank, registers the other way round.
  bool by_rows() const { return dots() != tiles(); }
};

// p ... p + n as fp32; what follows up to a multiple of W is zero.
template <class T>
inline void widen(const T* p, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(to + i, load(p + i));
  if (i < n) store(to + i, load(p + i, n - i));
}

// dot_tiles of rows of w that are converted once for all rows of `a`, n <= part_depth.
template <int J, class T>
inline void widened_dots(F* lanes, const float* a, int64_t lda, int rows, const T* const (&b)[max_j], int64_t n) {
  alignas(64) float buffer[J * part_depth];
  const float* wide[max_j] = {};
  for (int j = 0; j < J; ++j) {
    widen(b[j], n, buffer + j * part_depth);
    wide[j] = buffer + j * part_depth;
  }
  dot_tiles<float, J>(lanes, a, lda, rows, wide, 0, n);
}

// rank_update of rows of w that are converted once for all rows of `a`, depth <= part_rows.
template <class T>
inline void widened_rank(float* sums, int64_t ld, int rows, const float* at, int64_t lda, const T* w, int64_t w_in,
                         int64_t depth, int64_t n, int64_t ahead) {
  alignas(64) float buffer[part_rows * part_columns];
  for (int64_t c = 0; c < n; c += part_columns) {
    const int64_t here = smaller(part_columns, n - c);
    for (int64_t k = 0; k < depth; ++k) {
      const T* row = w + k * w_in + c;
      if (ahead != 0)
        for (int64_t i = 0; i < here; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(row + ahead + i);
      widen(row, here, buffer + k * part_columns);
    }
    rank_update(sums + c, ld, rows, at, lda, buffer, part_columns, depth, here, 0);
  }
}

// sums[m][o - o0] = a[m] . w[:, o] for o0 <= o < o0 + n, n <= unit.
template <class T>
inline void base_by_dots(const Linear<T>& job, int64_t m0, int rows, int64_t o0, int64_t n, float* sums, int64_t ld) {
#if defined(__AMX_BF16__)
  if constexpr (Operand<T>::bf16_products)
    if (job.tiles())
      return amx_dots(job.w + o0 * job.w_out, job.w_out, job.at + m0, job.rows, rows, job.in, n, sums, ld);
#endif
  const bool many = rows > few;
  with_dot_width(rows, [&](auto width) {
    constexpr int J = width.value;
    const int64_t held = many ? held_outputs : J, depth = many ? part_depth : dots_depth;
    F lanes[held_outputs * block_rows];  // [output / max_j][row][output % max_j]
    for (int64_t o = 0; o < n; o += held) {
      for (int64_t h = 0; h < held; h += max_j) std::memset(lanes + h * block_rows, 0, rows * max_j * sizeof(F));
      for (int64_t k = 0; k < job.in; k += depth) {
        const int64_t deep = smaller(depth, job.in - k);
        const auto* a = job.a + m0 * job.lda + k;
        for (int64_t h = 0; h < smaller(held, n - o); h += J) {
          const T* b[max_j] = {};
          for (int j = 0; j < J; ++j) b[j] = job.w + (o0 + smaller(o + h + j, n - 1)) * job.w_out + k;
          F* to = lanes + h / max_j * block_rows * max_j + h % max_j;
          if constexpr (Operand<T>::bf16_products)
            dot_tiles<J>(to, a, job.lda, rows, b, 0, deep);
          else if (sizeof(T) != sizeof(float) && many)
            widened_dots<J>(to, a, job.lda, rows, b, deep);
          else
            dot_tiles<T, J>(to, a, job.lda, rows, b, 0, deep);
        }
      }
      for (int m = 0; m < rows; ++m)
        for (int64_t h = 0; h < smaller(held, n - o); ++h)
          sums[m * ld + o + h] = sum(lanes[(h / max_j * block_rows + m) * max_j + h % max_j]);
    }
  });
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
  const bool many = rows > few;
  const int64_t step = many ? part_rows : rank_depth;
  for (int64_t k = 0; k < job.in; k += step) {
    const int64_t depth = smaller(step, job.in - k), ahead = k + 2 * step <= job.in ? step * job.w_in : 0;
    const auto* at = job.at + k / Operand<T>::depth * job.rows + m0;
    const T* w = job.w + k * job.w_in + o0;
    if constexpr (!Operand<T>::bf16_products && sizeof(T) != sizeof(float)) {
      if (many) {
        widened_rank(sums, ld, rows, at, job.rows, w, job.w_in, depth, n, ahead);
        continue;
      }
    }
    rank_update(sums, ld, rows, at, job.rows, w, job.w_in, depth, n, ahead);
  }
#if defined(__AVX512BF16__)
  if constexpr (Operand<T>::bf16_products) in_order(sums, ld, rows, n);
#endif
}

// sums += D*(z F^T) for n <= unit outputs from o0 on.
template <class T>
inline void add_adapter(const Linear<T>& job, int64_t m0, int rows, int64_t o0, int64_t n, float* sums,
                        int64_t sums_ld) {
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

// Outputs o0 ... o1 of all rows.
template <class T>
inline void linear_range(const Linear<T>& job, int64_t o0, int64_t o1) {
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
        if (job.zt != nullptr || job.z != nullptr) add_adapter(job, m0, rows, o + i, wide, sums + i, ld);
        write_out(job, m0, rows, o + i, wide, sums + i, ld);
      }
    }
  }
}

// The operand `a` as the base wants it, in parts: take_operand reserves, fill_operand converts columns l0 ... l1 (l0
// even).
template <class T>
inline void take_operand(Linear<T>& job, const Matrix& a, Scratch& scratch) {
  using Row = typename Linear<T>::Row;
  if (job.w == nullptr) return;
  if (!job.by_rows()) {
    job.at = scratch.take<typename Linear<T>::Column>((job.in + 1) / Operand<T>::depth * job.rows);
  } else if (sizeof(Row) == sizeof(T) && job.in % Operand<T>::row_multiple == 0 &&
             (Operand<T>::bf16_products || job.rows <= few)) {
    job.a = static_cast<const Row*>(a.data);
    job.lda = a.row_stride;
  } else {
    // parts of all rows spread over the sets of L1, whatever power of two the width is a multiple of
    job.lda = round_up(job.in, 4096 / static_cast<int64_t>(sizeof(Row))) + part_depth;
    job.a = scratch.take<Row>(job.rows * job.lda);
  }
}

template <class T>
inline void fill_operand(const Linear<T>& job, const Matrix& a, int64_t l0, int64_t l1) {
  if (job.w == nullptr || job.a == a.data) return;
  for (int64_t m = 0; m < job.rows; ++m) {
    const T* from = static_cast<const T*>(a.data) + m * a.row_stride;
    if (job.by_rows()) {
      auto* to = const_cast<typename Linear<T>::Row*>(job.a) + m * job.lda;
      if constexpr (Operand<T>::bf16_products) {
        std::memcpy(to + l0, from + l0, (l1 - l0) * sizeof(T));
        if (l1 == job.in) std::memset(to + l1, 0, (round_up(l1, 32) - l1) * sizeof(T));
      } else {
        int64_t l = l0;
        for (; l + W <= l1; l += W) store(to + l, load(from + l));
        if (l < l1) store(to + l, load(from + l, l1 - l));
      }
    } else if constexpr (Operand<T>::bf16_products) {
      uint32_t* to = const_cast<uint32_t*>(job.at) + m;
      for (int64_t l = l0; l < l1; l += 2)
        to[l / 2 * job.rows] = from[l].bits | (l + 1 < l1 ? static_cast<uint32_t>(from[l + 1].bits) << 16 : 0);
    } else {
      float* to = const_cast<float*>(job.at) + m;
      for (int64_t l = l0; l < l1; ++l) to[l * job.rows] = to_float(from[l]);
    }
  }
}

}  // namespace
}  // namespace svdkern
