// The whole forward and the whole backward of a layer with few rows, each one call.
//
//   forward    h = (D*x) U      z = h sigma | h R | h      y = x W^T + s z V^T + b
//   backward   p = dy V         t = s p                    q = t sigma | t R^T | t
//              dx = dy W + D*(q U^T)     dU = (D*x)^T q    dV = s dy^T z    db = sum dy
//              dsigma = sum h t          dR = h^T t        ds = sum p z
//
// x (M, K), W (N, K), U (K, r), V (N, r). Two parallel parts each: over chunks of the summed side (h; p, dV, db), then
// over units of the output side (y; dx, dU). Floor: one read of W each way; the skinny products add r/M of a read in
// fp32.
#pragma once

#include "linear.h"
#include "skinny.h"

namespace svdkern {
namespace {

// z = h sigma | h R | h, or with `transposed` q = t sigma | t R^T | t.
inline void couple(const float* h, int64_t rows, int64_t r, const Vector& sigma, const Matrix& core, bool transposed,
                   float* z) {
  if (core.data != nullptr) {
    const int64_t ld = round_up(r, W);
    Scratch scratch;
    float *c = scratch.take<float>(r * ld), *sums = scratch.take<float>(ld);
    for (int64_t i = 0; i < r; ++i)
      for (int64_t j = 0; j < ld; ++j) {
        const int64_t at =
            transposed ? j * core.row_stride + i * core.col_stride : i * core.row_stride + j * core.col_stride;
        c[i * ld + j] = j < r ? element(core.dtype, core.data, at) : 0.0f;
      }
    for (int64_t m = 0; m < rows; ++m) {
      std::memset(sums, 0, ld * sizeof(float));
      rank_update(sums, ld, 1, h + m * r, 1, c, ld, r, ld);
      std::memcpy(z + m * r, sums, r * sizeof(float));
    }
  } else if (sigma.data != nullptr) {
    Scratch scratch;
    float* s = scratch.take<float>(r);
    for (int64_t j = 0; j < r; ++j) s[j] = element(sigma.dtype, sigma.data, j * sigma.stride);
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t j = 0; j < r; ++j) z[m * r + j] = h[m * r + j] * s[j];
  } else {
    std::memcpy(z, h, rows * r * sizeof(float));
  }
}

// (M, r) -> (r, M), times scale.
inline float* transposed(Scratch& scratch, const float* z, int64_t rows, int64_t r, float scale) {
  float* zt = scratch.take<float>(r * rows);
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t j = 0; j < r; ++j) zt[j * rows + m] = scale * z[m * r + j];
  return zt;
}

template <class T>
inline void contract_all(const Matrix& a, const Dropout& dropout, const Matrix& f, int64_t l0, int64_t l1, float* out) {
  for (int64_t m0 = 0; m0 < a.rows; m0 += block_rows) {
    const int rows = static_cast<int>(smaller<int64_t>(block_rows, a.rows - m0));
    contract_block<T>(a, dropout, m0, rows, l0, l1, f, out + m0 * f.cols);
  }
}

template <class T>
inline void base_operand(Linear<T>& job, const Matrix& w, bool transpose_w) {
  job.w = static_cast<const T*>(w.data);
  job.w_in = transpose_w ? w.col_stride : w.row_stride;
  job.w_out = transpose_w ? w.row_stride : w.col_stride;
}

template <class T>
inline void forward_of_few(const ForwardParams& p) {
  const int64_t rows = p.x.rows, in = p.x.cols, out = p.y.cols, r = p.u.cols;
  Scratch scratch;
  Linear<T> job;
  job.rows = rows, job.in = in, job.out = out;
  base_operand(job, p.weight, true);
  job.bias = p.bias;
  job.y = static_cast<T*>(p.y.data), job.ldy = p.y.row_stride;
  take_operand(job, p.x, scratch);

  const int64_t chunk = chunk_of(in), chunks = chunks_of(in);
  float* partial = scratch.take<float>(chunks * rows * r);
  parallel(p.parallel_for, chunks, rows * (r + 1) * smaller(chunk, in), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const int64_t l0 = c * chunk, l1 = smaller(in, l0 + chunk);
      fill_operand(job, p.x, l0, l1);
      if (r != 0) contract_all<T>(p.x, p.dropout, p.u, l0, l1, partial + c * rows * r);
    }
  });
  add_chunks(partial, chunks, rows * r, p.h);
  if (r != 0) {
    float* z = scratch.take<float>(rows * r);
    couple(p.h, rows, r, p.sigma, p.core, false, z);
    job.zt = transposed(scratch, z, rows, r, p.scale);
    job.f = p.v;
  }
  const int64_t units = (out + unit - 1) / unit;
  parallel(p.parallel_for, units, rows * smaller(unit, out) * (in + r),
           [&](int64_t begin, int64_t end) { linear_range(job, begin * unit, smaller(out, end * unit)); });
}

// The sums over rows of products of (M, r) matrices: small, so one thread.
inline void core_gradients(const BackwardParams& b, const float* h, const float* t, const float* p, const float* z,
                           int64_t rows, int64_t r) {
  Scratch scratch;
  if (b.dsigma.data != nullptr) {
    float* total = scratch.take<float>(r);
    std::memset(total, 0, r * sizeof(float));
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t j = 0; j < r; ++j) total[j] += h[m * r + j] * t[m * r + j];
    with_type(b.dsigma.dtype, [&](auto e) {
      for (int64_t j = 0; j < r; ++j) from_float(static_cast<decltype(e)*>(b.dsigma.data) + j, total[j]);
    });
  }
  if (b.dcore.data != nullptr) {
    const int64_t ld = round_up(r, W);
    float *total = scratch.take<float>(r * ld), *row = scratch.take<float>(ld);
    std::memset(total, 0, r * ld * sizeof(float));
    std::memset(row, 0, ld * sizeof(float));
    for (int64_t m = 0; m < rows; ++m) {
      std::memcpy(row, t + m * r, r * sizeof(float));
      rank_update(total, ld, r, h + m * r, r, row, ld, 1, ld);
    }
    for (int64_t i = 0; i < r; ++i)
      for (int64_t j = 0; j < r; ++j) {
        const int64_t at = i * b.dcore.row_stride + j * b.dcore.col_stride;
        with_type(b.dcore.dtype,
                  [&](auto e) { from_float(static_cast<decltype(e)*>(b.dcore.data) + at, total[i * ld + j]); });
      }
  }
  if (b.dscale != nullptr) {
    float total = 0.0f;
    for (int64_t i = 0; i < rows * r; ++i) total += p[i] * z[i];
    *b.dscale = total;
  }
}

template <class T>
inline void bias_gradient(const Matrix& dy, const MutableVector& dbias, int64_t l0, int64_t l1) {
  for (int64_t l = l0; l < l1; l += W) {
    const int64_t n = smaller<int64_t>(W, l1 - l);
    F total = {};
    for (int64_t m = 0; m < dy.rows; ++m) total += load(static_cast<const T*>(dy.data) + m * dy.row_stride + l, n);
    store(static_cast<T*>(dbias.data) + l, total, n);
  }
}

template <class T>
inline void backward_of_few(const BackwardParams& b) {
  const int64_t rows = b.dy.rows, n = b.dy.cols, r = b.v.cols, k = b.u.rows;
  const Dropout none;
  const bool wants_dx = b.dx.data != nullptr, wants_du = b.du.data != nullptr;
  Scratch scratch;
  Linear<T> job;
  job.rows = rows, job.in = n, job.out = k;
  if (wants_dx) {
    base_operand(job, b.weight, false);
    job.y = static_cast<T*>(b.dx.data), job.ldy = b.dx.row_stride;
    take_operand(job, b.dy, scratch);
  }
  float *h = nullptr, *z = nullptr, *sz = nullptr;
  if (b.h.data != nullptr) {
    h = scratch.take<float>(rows * r), z = scratch.take<float>(rows * r), sz = scratch.take<float>(rows * r);
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t j = 0; j < r; ++j)
        h[m * r + j] = static_cast<const float*>(b.h.data)[m * b.h.row_stride + j * b.h.col_stride];
    couple(h, rows, r, b.sigma, b.core, false, z);
    scale_by(b.scale, z, rows * r, sz);
  }

  const bool wants_p = r != 0 && (wants_dx || wants_du || b.dsigma.data || b.dcore.data || b.dscale);
  const int64_t chunk = chunk_of(n), chunks = chunks_of(n);
  float* partial = scratch.take<float>(chunks * rows * r);
  parallel(b.parallel_for, chunks, rows * 2 * (r + 1) * smaller(chunk, n), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const int64_t l0 = c * chunk, l1 = smaller(n, l0 + chunk);
      if (wants_dx) fill_operand(job, b.dy, l0, l1);
      if (wants_p) contract_all<T>(b.dy, none, b.v, l0, l1, partial + c * rows * r);
      if (b.dv.data != nullptr) outer_range<T>(b.dy, none, sz, b.dv, l0, l1);
      if (b.dbias.data != nullptr) bias_gradient<T>(b.dy, b.dbias, l0, l1);
    }
  });
  float *p = scratch.take<float>(rows * r), *t = scratch.take<float>(rows * r), *q = scratch.take<float>(rows * r);
  if (wants_p) {
    add_chunks(partial, chunks, rows * r, p);
    scale_by(b.scale, p, rows * r, t);
    couple(t, rows, r, b.sigma, b.core, true, q);
  }
  core_gradients(b, h, t, p, z, rows, r);
  if (!wants_dx && !wants_du) return;

  if (r != 0 && wants_dx) {
    job.zt = transposed(scratch, q, rows, r, 1.0f);
    job.f = b.u;
    job.dropout = b.dropout;
  }
  const int64_t units = (k + unit - 1) / unit;
  parallel(b.parallel_for, units, rows * smaller(unit, k) * (n + 2 * r), [&](int64_t begin, int64_t end) {
    const int64_t o0 = begin * unit, o1 = smaller(k, end * unit);
    if (wants_dx) linear_range(job, o0, o1);
    if (wants_du) outer_range<T>(b.x, b.dropout, q, b.du, o0, o1);
  });
}

}  // namespace
}  // namespace svdkern
