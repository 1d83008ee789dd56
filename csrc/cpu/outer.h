// out (L, r) = (D*a)^T q of many rows: one read of a.
//
// Each thread owns columns of a and walks down the rows: sums (r, outer_columns) stay in cache, a's rows of one column
// strip pass through it a few at a time. Sums over M are in order, so no bit depends on the threads. On bf16
// products q is rounded to bf16 once.
#pragma once

#include "engine.h"
#include "skinny.h"

namespace svdkern {
namespace {

// Rows in one pass over the sums: few where the sums stay in L1 (a is then read in many streams), more where they do
// not.
constexpr int64_t outer_depth = 128, shallow_depth = 32, shallow_rank = 32;
constexpr int64_t outer_columns = 1024;

template <class T>
class Outer {
 public:
  // q (M, r) contiguous.
  Outer(const Matrix& a, const Dropout& dropout, const float* q, const MutableMatrix& out, ParallelFor parallel_for,
        Scratch& scratch)
      : a_(a), dropout_(dropout), q_(q), out_(out), r_(out.cols) {
    if constexpr (!bf16_products) return;
    const int64_t blocks = (a.rows + outer_depth - 1) / outer_depth;
    pairs_ = scratch.take<uint32_t>(blocks * outer_depth / 2 * ld());
    parallel(parallel_for, blocks, outer_depth * r_, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) pack(b * outer_depth);
    });
  }

  void columns(int64_t l0, int64_t l1) const {
    [[maybe_unused]] const typename EngineOf<T>::Type::Session session;
    Scratch scratch;
    const int64_t sums_stride = round_up(smaller(outer_columns, l1 - l0), 32) + 16;
    float* sums = scratch.take<float>(ld() * sums_stride);
    T* kept_rows = dropout_.threshold == 0 ? nullptr : scratch.take<T>(outer_depth * sums_stride);
    for (int64_t l = l0; l < l1; l += outer_columns) {
      const int64_t n = smaller(outer_columns, l1 - l);
      std::memset(sums, 0, ld() * sums_stride * sizeof(float));
      for (int64_t m = 0; m < a_.rows; m += depth_) {
        const int64_t depth = smaller(depth_, a_.rows - m);
        const T* rows = static_cast<const T*>(a_.data) + m * a_.row_stride + l;
        for (int64_t i = 0; i < depth && kept_rows != nullptr; ++i)
          keep_run(rows + i * a_.row_stride, dropout_, m + i, l, n, kept_rows + i * sums_stride);
        update(sums, sums_stride, m, kept_rows != nullptr ? kept_rows : rows,
               kept_rows != nullptr ? sums_stride : a_.row_stride, depth, n);
      }
      finish(sums, sums_stride, n);
      for (int64_t j0 = 0; j0 < r_; j0 += panel_columns)
        store_panel(out_, l, n, j0, smaller<int64_t>(panel_columns, r_ - j0), sums + j0 * sums_stride, sums_stride);
    }
  }

 private:
  static constexpr bool bf16_products = EngineOf<T>::Type::per_element == 2;

  int64_t ld() const { return round_up(r_, 16); }

  // Rows m ... m + outer_depth of q as bf16 pairs: [row / 2][j], and for tiles [row / 32][j][row % 32 / 2].
  void pack(int64_t m) {
#if defined(__AVX512BF16__)
    for (int64_t k = m; k < m + outer_depth; k += 2 * W)
      for (int64_t j = 0; j < ld(); j += W) {
        const int64_t n = larger<int64_t>(0, smaller<int64_t>(W, r_ - j));
        F v[W];
        for (int64_t i = 0; i < W; ++i) {
          U32 half[2] = {};
          for (int64_t h = 0; h < 2; ++h)
            if (const int64_t row = k + 2 * i + h; row < a_.rows)
              half[h] = __builtin_convertvector(downcast(load(q_ + row * r_ + j, n), bf16{}), U32);
          v[i] = bit_cast<F>(half[0] | half[1] << 16);
        }
        float* to = reinterpret_cast<float*>(pairs_);
#if defined(__AMX_BF16__)
        transpose(v);
        for (int64_t i = 0; i < W; ++i) store(to + (k / 2 * ld() + (j + i) * W), v[i]);
#else
        for (int64_t i = 0; i < W; ++i) store(to + (k / 2 + i) * ld() + j, v[i]);
#endif
      }
#else
    (void)m;
#endif
  }

  void update(float* sums, int64_t sums_stride, int64_t m, const T* rows, int64_t row_stride, int64_t depth,
              int64_t n) const {
    if constexpr (!bf16_products) {
      alignas(64) float panel[outer_depth * Fma::tile_columns];  // rows far apart would share their cache sets
      for (int64_t c = 0; c < n; c += Fma::tile_columns) {
        const int64_t columns = smaller(Fma::tile_columns, n - c);
        Fma::pack_b<T>({rows + c, DType::f32, row_stride, 1}, 0, depth, 0, columns, panel);
        rank_update(sums + c, sums_stride, r_, q_ + m * r_, r_, panel, Fma::tile_columns, depth, round_up(columns, W));
      }
    } else {
#if defined(__AMX_BF16__)
      alignas(64) uint32_t panel[outer_depth / 2 * Pairs::tile_columns];
      for (int64_t c = 0; c < n; c += Pairs::tile_columns) {
        const int64_t columns = smaller(Pairs::tile_columns, n - c);
        Tiles::pack_b<bf16>({rows + c, DType::bf16, row_stride, 1}, 0, depth, 0, columns, panel);
        int64_t j = 0;
        for (; j + 2 * W <= ld(); j += 2 * W) {  // 32 rows of q at a time: a tile of a serves two products
          const uint32_t* q = pairs_ + m / 2 * ld() + j * W;
          float *at = sums + j * sums_stride + c, *below = at + W * sums_stride;
          tile_load<0>(at, 4 * sums_stride), tile_load<1>(at + W, 4 * sums_stride);
          tile_load<2>(below, 4 * sums_stride), tile_load<3>(below + W, 4 * sums_stride);
          for (int64_t k = 0; k < depth; k += 32) {
            tile_load<4>(q + k / 2 * ld(), 4 * W);
            tile_load<6>(panel + k / 2 * Pairs::tile_columns, 4 * Pairs::tile_columns);
            tile_multiply<0, 4, 6>();
            tile_load<5>(q + k / 2 * ld() + W * W, 4 * W);
            tile_multiply<2, 5, 6>();
            tile_load<7>(panel + k / 2 * Pairs::tile_columns + W, 4 * Pairs::tile_columns);
            tile_multiply<1, 4, 7>();
            tile_multiply<3, 5, 7>();
          }
          tile_store<0>(at, 4 * sums_stride), tile_store<1>(at + W, 4 * sums_stride);
          tile_store<2>(below, 4 * sums_stride), tile_store<3>(below + W, 4 * sums_stride);
        }
        if (j < ld()) {
          float* at = sums + j * sums_stride + c;
          tile_load<0>(at, 4 * sums_stride), tile_load<1>(at + W, 4 * sums_stride);
          for (int64_t k = 0; k < depth; k += 32) {
            tile_load<4>(pairs_ + (m + k) / 2 * ld() + j * W, 4 * W);
            tile_load<6>(panel + k / 2 * Pairs::tile_columns, 4 * Pairs::tile_columns);
            tile_multiply<0, 4, 6>();
            tile_load<7>(panel + k / 2 * Pairs::tile_columns + W, 4 * Pairs::tile_columns);
            tile_multiply<1, 4, 7>();
          }
          tile_store<0>(at, 4 * sums_stride), tile_store<1>(at + W, 4 * sums_stride);
        }
      }
#elif defined(__AVX512BF16__)
      rank_update(sums, sums_stride, r_, pairs_ + m / 2 * ld(), ld(), rows, row_stride, depth, n, 0);
#endif
    }
  }

  void finish(float* sums, int64_t sums_stride, int64_t n) const {
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
    if constexpr (bf16_products) in_order(sums, sums_stride, r_, n);
#endif
    if (dropout_.threshold == 0) return;
    const F factor = splat(static_cast<float>(1.0 / (1.0 - dropout_.threshold / 65536.0)));
    for (int64_t j = 0; j < r_; ++j)
      for (int64_t i = 0; i < n; i += W) store(sums + j * sums_stride + i, factor * load(sums + j * sums_stride + i));
  }

  const Matrix& a_;
  const Dropout& dropout_;
  const float* q_;
  const MutableMatrix& out_;
  const int64_t r_, depth_ = r_ <= shallow_rank ? shallow_depth : outer_depth;
  uint32_t* pairs_ = nullptr;
};

}  // namespace
}  // namespace svdkern
