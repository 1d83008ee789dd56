// The whole forward and the whole backward of a layer with many rows, each one call: the formulas of small_m.h over
// the fused products of gemm.h and outer.h.
#pragma once

#include "gemm.h"
#include "outer.h"
#include "small_m.h"

namespace svdkern {
namespace {

template <class T>
inline void forward_of_many(const ForwardParams& p) {
  const int64_t r = p.u.cols;
  Scratch scratch;
  FusedJob job;
  job.a = p.x;
  job.w = by_columns(p.weight);
  if (r != 0) {
    job.e = by_rows(p.u), job.f = by_columns(p.v);
    job.h = p.h, job.z = scratch.take<float>(p.x.rows * r);
  }
  job.out = p.y.cols, job.r = r;
  job.drop_a = p.dropout;
  job.bias = p.bias;
  job.y = p.y;
  job.parallel_for = p.parallel_for, job.threads = p.threads;
  Fused<T>(job).run([&](int64_t m0, int64_t rows, const float* h, float* z) { modulate(p.by, m0, rows, r, h, z); });
}

template <class T>
inline void backward_of_many(const BackwardParams& b) {
  const int64_t rows = b.dy.rows, n = b.dy.cols, r = b.v.cols, k = b.u.rows;
  const Dropout none;
  const bool wants_dx = b.dx.data != nullptr, wants_du = b.du.data != nullptr;
  const bool wants_sums = b.dsigma.data || b.dcore.data || b.dgate || b.dscale;
  const bool wants_p = r != 0 && (wants_dx || wants_du || wants_sums);
  Scratch scratch;
  float *p = scratch.take<float>(rows * r), *t = scratch.take<float>(rows * r), *q = scratch.take<float>(rows * r);
  FusedJob job;
  job.a = b.dy;
  job.out = k, job.r = r;
  job.parallel_for = b.parallel_for, job.threads = b.threads;
  if (wants_p) job.e = by_rows(b.v), job.h = p, job.z = q;
  if (wants_dx) {
    job.w = by_rows(b.weight);
    if (r != 0) job.f = by_columns(b.u);
    job.drop_y = b.dropout;
    job.y = b.dx;
  }
  if (wants_p || wants_dx)
    Fused<T>(job).run([&](int64_t m0, int64_t here, const float* from, float* to) {
      modulate_back(b.by, m0, here, r, from, t + m0 * r, to);
    });

  const Kept kept(b, scratch);
  if (kept.h != nullptr)
    parallel(b.parallel_for, rows, r * (b.by.core.data != nullptr ? r : 4),
             [&](int64_t begin, int64_t end) { kept.rows(b, begin, end); });
  modulation_gradients(b, kept, t, p, rows, r);

  // dV and db over dy's columns, then dU over x's.
  const bool wants_dv = b.dv.data != nullptr;
  Scratch packed;
  const int64_t dy_units = wants_dv || b.dbias.data ? (n + unit - 1) / unit : 0;
  const int64_t x_units = wants_du ? (k + unit - 1) / unit : 0;
  const Outer<T> dv(b.dy, none, kept.z, b.dv, b.parallel_for, packed);
  const Outer<T> du(b.x, b.dropout, q, b.du, b.parallel_for, packed);
  parallel(b.parallel_for, dy_units + x_units, rows * unit * (r + 1), [&](int64_t begin, int64_t end) {
    const int64_t l0 = smaller(n, begin * unit), l1 = smaller(n, smaller(end, dy_units) * unit);
    if (l0 < l1 && wants_dv) dv.columns(l0, l1);
    if (l0 < l1 && b.dbias.data != nullptr) bias_gradient<T>(b.dy, b.dbias, l0, l1);
    const int64_t from = larger<int64_t>(0, begin - dy_units) * unit, to = smaller(k, (end - dy_units) * unit);
    if (from < to) du.columns(from, to);
  });
}

}  // namespace
}  // namespace svdkern
