// The whole forward and the whole backward of a layer with few rows, each one call.
//
//   forward    h = (D*x) U      y = x W^T + z V^T + b
//   backward   p = dy V         dx = dy W + D*(q U^T)     dU = (D*x)^T q    dV = dy^T z    db = sum dy
//
// with z from h, q from p and the small gradients as in modulation.h.
// x (M, K), W (N, K), U (K, r), V (N, r). Two parallel parts each: over chunks of the summed side (h; p, dV, db), then
// over units of the output side (y; dx, dU). Floor: one read of W each way; the skinny products add r/M of a read in
// fp32.
#pragma once

#include "linear.h"
#include "modulation.h"
#include "skinny.h"

namespace svdkern {
namespace {

// (M, r) -> (r, M)
inline float* transposed(Scratch& scratch, const float* z, int64_t rows, int64_t r) {
  float* zt = scratch.take<float>(r * rows);
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t j = 0; j < r; ++j) zt[j * rows + m] = z[m * r + j];
  return zt;
}

// z (M, r) and the factor as linear.h wants them: rows of F where they lie if that is less work than turning them.
template <class T>
inline void set_adapter(Linear<T>& job, const float* z, const Matrix& f, Scratch& scratch) {
  job.f = f;
  if (whole_rows(f) && job.rows <= 4 && f.cols >= 4 * W)
    job.z = z;
  else
    job.zt = transposed(scratch, z, job.rows, f.cols);
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
    modulate(p.by, 0, rows, r, p.h, z);
    set_adapter(job, z, p.v, scratch);
  }
  const int64_t units = (out + unit - 1) / unit;
  parallel(p.parallel_for, units, rows * smaller(unit, out) * (in + r),
           [&](int64_t begin, int64_t end) { linear_range(job, begin * unit, smaller(out, end * unit)); });
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
  const Kept kept(b, scratch);
  if (kept.h != nullptr) kept.rows(b, 0, rows);

  const bool wants_p = r != 0 && (wants_dx || wants_du || b.dsigma.data || b.dcore.data || b.dgate || b.dscale);
  const int64_t chunk = chunk_of(n), chunks = chunks_of(n);
  float* partial = scratch.take<float>(chunks * rows * r);
  parallel(b.parallel_for, chunks, rows * 2 * (r + 1) * smaller(chunk, n), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const int64_t l0 = c * chunk, l1 = smaller(n, l0 + chunk);
      if (wants_dx) fill_operand(job, b.dy, l0, l1);
      if (wants_p) contract_all<T>(b.dy, none, b.v, l0, l1, partial + c * rows * r);
      if (b.dv.data != nullptr) outer_range<T>(b.dy, none, kept.z, b.dv, l0, l1);
      if (b.dbias.data != nullptr) bias_gradient<T>(b.dy, b.dbias, l0, l1);
    }
  });
  float *p = scratch.take<float>(rows * r), *t = scratch.take<float>(rows * r), *q = scratch.take<float>(rows * r);
  if (wants_p) {
    add_chunks(partial, chunks, rows * r, p);
    modulate_back(b.by, 0, rows, r, p, t, q);
  }
  modulation_gradients(b, kept, t, p, rows, r);
  if (!wants_dx && !wants_du) return;

  if (r != 0 && wants_dx) {
    set_adapter(job, q, b.u, scratch);
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
