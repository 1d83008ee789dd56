// The primitives on their own, for any number of rows: shrink, outer, dropout, and the frozen product of few rows
// (gemv).
#pragma once

#include "small_m.h"

namespace svdkern {
namespace {

// Few rows: over chunks of the summed side. Many rows: over blocks of rows, and the factor is converted to fp32 once.
template <class T>
inline void shrink_as(const ShrinkParams& p) {
  const int64_t rows = p.a.rows, length = p.a.cols, r = p.f.cols;
  const int64_t chunk = chunk_of(length), chunks = chunks_of(length);
  Scratch scratch;
  if (rows <= block_rows) {
    float* partial = scratch.take<float>(chunks * rows * r);
    parallel(p.parallel_for, chunks, rows * r * smaller(chunk, length), [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c)
        contract_all<T>(p.a, p.dropout, p.f, c * chunk, smaller(length, (c + 1) * chunk), partial + c * rows * r);
    });
    add_chunks(partial, chunks, rows * r, p.out);
    return;
  }
  Matrix f = p.f;
  const int64_t ld = round_up(length, strip) + 16;
  float* packed = scratch.take<float>(ld * r);
  parallel(p.parallel_for, (length + strip - 1) / strip, strip * r, [&](int64_t begin, int64_t end) {
    for (int64_t l = begin * strip; l < smaller(length, end * strip); l += strip)
      for (int64_t j0 = 0; j0 < r; j0 += panel_columns) {
        const int64_t n = smaller(strip, length - l);
        with_type(p.f.dtype, [&](auto t) {
          load_panel_as<decltype(t)>(p.f, l, n, j0, smaller<int64_t>(panel_columns, r - j0), packed + j0 * ld + l, ld);
        });
      }
  });
  f.data = packed, f.dtype = DType::f32, f.row_stride = 1, f.col_stride = ld;
  const int64_t blocks = (rows + block_rows - 1) / block_rows;
  parallel(p.parallel_for, blocks, block_rows * length * r, [&](int64_t begin, int64_t end) {
    Scratch own;
    float* partial = own.take<float>(chunks * block_rows * r);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t m0 = b * block_rows, here = smaller<int64_t>(block_rows, rows - m0);
      for (int64_t c = 0; c < chunks; ++c)
        contract_block<T>(p.a, p.dropout, m0, static_cast<int>(here), c * chunk, smaller(length, (c + 1) * chunk), f,
                          partial + c * here * r);
      add_chunks(partial, chunks, here * r, p.out + m0 * r);
    }
  });
}

template <class T>
inline void outer_as(const OuterParams& p) {
  const int64_t units = (p.a.cols + unit - 1) / unit;
  parallel(p.parallel_for, units, p.a.rows * unit * p.out.cols, [&](int64_t begin, int64_t end) {
    outer_range<T>(p.a, p.dropout, static_cast<const float*>(p.q.data), p.out, begin * unit,
                   smaller(p.a.cols, end * unit));
  });
}

template <class T>
inline void dropout_as(const DropoutParams& p) {
  parallel(p.parallel_for, p.x.rows, 4 * p.x.cols, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const T* x = static_cast<const T*>(p.x.data) + m * p.x.row_stride;
      T* out = static_cast<T*>(p.out.data) + m * p.out.row_stride;
      for (int64_t c = 0; c < p.x.cols; c += mask_columns) {
        alignas(64) float keep[mask_columns];
        mask_row(p.dropout, m, c, keep);
        for (int64_t i = c; i < smaller(c + mask_columns, p.x.cols); i += W) {
          const int64_t n = smaller<int64_t>(W, p.x.cols - i);
          store(out + i, masked(load(x + i, n), load(keep + i - c)), n);
        }
      }
    }
  });
}

template <class T>
inline void gemv_as(const GemvParams& p) {
  Scratch scratch;
  Linear<T> job;
  job.rows = p.a.rows, job.in = p.a.cols, job.out = p.w.cols;
  base_operand(job, p.w, false);
  job.bias = p.bias;
  job.y = static_cast<T*>(p.out.data), job.ldy = p.out.row_stride;
  take_operand(job, p.a, scratch);
  fill_operand(job, p.a, 0, job.in);
  const int64_t units = (job.out + unit - 1) / unit;
  parallel(p.parallel_for, units, job.rows * smaller(unit, job.out) * job.in,
           [&](int64_t begin, int64_t end) { linear_range(job, begin * unit, smaller(job.out, end * unit)); });
}

// The table of this file's instruction set; storage types are dispatched here, once a call.
constexpr Kernels kernels_named(const char* name) {
  return {
      name,
      [](const ForwardParams& p) { with_type(p.x.dtype, [&](auto t) { forward_as<decltype(t)>(p); }); },
      [](const BackwardParams& p) { with_type(p.dy.dtype, [&](auto t) { backward_as<decltype(t)>(p); }); },
      [](const ShrinkParams& p) { with_type(p.a.dtype, [&](auto t) { shrink_as<decltype(t)>(p); }); },
      [](const OuterParams& p) { with_type(p.a.dtype, [&](auto t) { outer_as<decltype(t)>(p); }); },
      [](const DropoutParams& p) { with_type(p.x.dtype, [&](auto t) { dropout_as<decltype(t)>(p); }); },
      [](const GemvParams& p) { with_type(p.a.dtype, [&](auto t) { gemv_as<decltype(t)>(p); }); },
      philox_bits,
  };
}

}  // namespace
}  // namespace svdkern
