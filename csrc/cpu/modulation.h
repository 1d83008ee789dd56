// What stands between h and z, and its gradients: (M, r) matrices, small beside the layer.
//
//   forward    c = h sigma | h R | h      z = s c g
//   backward   t = s p g                  q = t sigma | t R^T | t
//              dsigma = sum h t           dR = h^T t       dg = s p c       ds = sum p c g
#pragma once

#include "factor.h"
#include "scratch.h"
#include "skinny.h"
#include "tiles.h"

namespace svdkern {
namespace {

// c from h, or with `transposed` q from t.
inline void couple(const Modulation& by, const float* h, int64_t rows, int64_t r, bool transposed, float* c) {
  Scratch scratch;
  if (by.core.data != nullptr) {
    const Matrix& core = by.core;
    const int64_t ld = round_up(r, W);
    float *dense = scratch.take<float>(r * ld), *sums = scratch.take<float>(ld);
    for (int64_t i = 0; i < r; ++i)
      for (int64_t j = 0; j < ld; ++j) {
        const int64_t at =
            transposed ? j * core.row_stride + i * core.col_stride : i * core.row_stride + j * core.col_stride;
        dense[i * ld + j] = j < r ? element(core.dtype, core.data, at) : 0.0f;
      }
    for (int64_t m = 0; m < rows; ++m) {
      std::memset(sums, 0, ld * sizeof(float));
      rank_update(sums, ld, 1, h + m * r, 1, dense, ld, r, ld);
      std::memcpy(c + m * r, sums, r * sizeof(float));
    }
  } else if (by.sigma.data != nullptr) {
    float* s = scratch.take<float>(r);
    for (int64_t j = 0; j < r; ++j) s[j] = element(by.sigma.dtype, by.sigma.data, j * by.sigma.stride);
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t j = 0; j < r; ++j) c[m * r + j] = h[m * r + j] * s[j];
  } else {
    std::memcpy(c, h, rows * r * sizeof(float));
  }
}

// The gate of row m, elements col_stride apart.
inline const float* gate_row(const Matrix& gate, int64_t m) {
  return static_cast<const float*>(gate.data) + (gate.rows == 1 ? 0 : m) * gate.row_stride;
}

// s g times rows m0 ... m0 + rows, which begin at `from`; may be done in place.
inline void weigh(const Modulation& by, int64_t m0, int64_t rows, int64_t r, const float* from, float* to) {
  if (by.gate.data == nullptr) return scale_by(by.scale, from, rows * r, to);
  for (int64_t m = 0; m < rows; ++m) {
    const float* g = gate_row(by.gate, m0 + m);
    for (int64_t j = 0; j < r; ++j) to[m * r + j] = from[m * r + j] * g[j * by.gate.col_stride] * by.scale;
  }
}

// z of rows m0 ... m0 + rows.
inline void modulate(const Modulation& by, int64_t m0, int64_t rows, int64_t r, const float* h, float* z) {
  couple(by, h, rows, r, false, z);
  weigh(by, m0, rows, r, z, z);
}

// t and q of rows m0 ... m0 + rows.
inline void modulate_back(const Modulation& by, int64_t m0, int64_t rows, int64_t r, const float* p, float* t,
                          float* q) {
  weigh(by, m0, rows, r, p, t);
  couple(by, t, rows, r, true, q);
}

// The forward's rows, made again from the h that was kept; null without one.
struct Kept {
  float *h = nullptr, *c = nullptr, *z = nullptr;

  Kept(const BackwardParams& b, Scratch& scratch) {
    if (b.h.data == nullptr) return;
    const int64_t size = b.h.rows * b.h.cols;
    h = scratch.take<float>(size), c = scratch.take<float>(size), z = scratch.take<float>(size);
  }

  void rows(const BackwardParams& b, int64_t begin, int64_t end) const {
    const int64_t r = b.h.cols;
    for (int64_t m = begin; m < end; ++m)
      for (int64_t j = 0; j < r; ++j)
        h[m * r + j] = static_cast<const float*>(b.h.data)[m * b.h.row_stride + j * b.h.col_stride];
    couple(b.by, h + begin * r, end - begin, r, false, c + begin * r);
    weigh(b.by, begin, end - begin, r, c + begin * r, z + begin * r);
  }
};

// The sums over rows of products of (M, r) matrices, and the gate's gradient: small, so one thread.
inline void modulation_gradients(const BackwardParams& b, const Kept& kept, const float* t, const float* p,
                                 int64_t rows, int64_t r) {
  Scratch scratch;
  if (b.dsigma.data != nullptr) {
    float* total = scratch.take<float>(r);
    std::memset(total, 0, r * sizeof(float));
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t j = 0; j < r; ++j) total[j] += kept.h[m * r + j] * t[m * r + j];
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
      rank_update(total, ld, r, kept.h + m * r, r, row, ld, 1, ld);
    }
    for (int64_t i = 0; i < r; ++i)
      for (int64_t j = 0; j < r; ++j) {
        const int64_t at = i * b.dcore.row_stride + j * b.dcore.col_stride;
        with_type(b.dcore.dtype,
                  [&](auto e) { from_float(static_cast<decltype(e)*>(b.dcore.data) + at, total[i * ld + j]); });
      }
  }
  if (b.dgate != nullptr)
    for (int64_t i = 0; i < rows * r; ++i) b.dgate[i] = b.by.scale * p[i] * kept.c[i];
  if (b.dscale != nullptr) {
    float total = 0.0f;
    for (int64_t m = 0; m < rows; ++m) {
      const float* g = b.by.gate.data == nullptr ? nullptr : gate_row(b.by.gate, m);
      for (int64_t i = m * r; i < (m + 1) * r; ++i)
        total += p[i] * kept.c[i] * (g == nullptr ? 1.0f : g[(i - m * r) * b.by.gate.col_stride]);
    }
    *b.dscale = total;
  }
}

}  // namespace
}  // namespace svdkern
