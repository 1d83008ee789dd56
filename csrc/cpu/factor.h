// Factors (L, r) of any storage type and strides, seen by the products as fp32 panels [column j][row l]: l contiguous,
// so that all three skinny products vectorise along the long side L whichever way the factor is stored.
//
//   unit stride along L (a transposed view, lora_A.weight.t()): rows of the panel are converted runs of the factor
//   unit stride along r: W x W transposes in registers (about half an instruction an element)
//   neither: one element at a time
#pragma once

#include "vec.h"

namespace svdkern {
namespace {

constexpr int panel_columns = 16;  // factor columns in one panel

template <class T>
inline void load_panel_as(const Matrix& f, int64_t l0, int64_t n, int64_t j0, int64_t columns, float* panel,
                          int64_t ld) {
  const T* p = static_cast<const T*>(f.data) + l0 * f.row_stride + j0 * f.col_stride;
  if (f.row_stride == 1) {
    for (int64_t j = 0; j < columns; ++j) {
      const T* run = p + j * f.col_stride;
      int64_t l = 0;
      for (; l + W <= n; l += W) store(panel + j * ld + l, load(run + l));
      if (l < n) store(panel + j * ld + l, load(run + l, n - l));
    }
  } else if (f.col_stride == 1) {
    for (int64_t j = 0; j < columns; j += W) {
      const int64_t wide = smaller<int64_t>(W, columns - j);
      for (int64_t l = 0; l < n; l += W) {
        F v[W] = {};
        const int64_t high = smaller<int64_t>(W, n - l);
        const T* row = p + l * f.row_stride + j;
        if (wide == W)
          for (int i = 0; i < high; ++i) v[i] = load(row + i * f.row_stride);
        else
          for (int i = 0; i < high; ++i) v[i] = load(row + i * f.row_stride, wide);
        transpose(v);
        for (int i = 0; i < wide; ++i) store(panel + (j + i) * ld + l, v[i]);
      }
    }
  } else {
    for (int64_t j = 0; j < columns; ++j) {
      float* row = panel + j * ld;
      for (int64_t l = 0; l < n; ++l) row[l] = to_float(p[l * f.row_stride + j * f.col_stride]);
      for (int64_t l = n; l < round_up(n, W); ++l) row[l] = 0.0f;
    }
  }
}

struct Panel {
  const float* data;
  int64_t ld;
};

// f[l0 ... l0 + n][j0 ... j0 + columns] in fp32, zero from n up to a multiple of W; in place where it already is that.
inline Panel load_panel(const Matrix& f, int64_t l0, int64_t n, int64_t j0, int64_t columns, float* buffer,
                        int64_t ld) {
  if (f.dtype == DType::f32 && f.row_stride == 1 && n % W == 0)
    return {static_cast<const float*>(f.data) + l0 + j0 * f.col_stride, f.col_stride};
  with_type(f.dtype, [&](auto t) { load_panel_as<decltype(t)>(f, l0, n, j0, columns, buffer, ld); });
  return {buffer, ld};
}

template <class T>
inline void store_panel_as(const MutableMatrix& f, int64_t l0, int64_t n, int64_t j0, int64_t columns,
                           const float* panel, int64_t ld) {
  T* p = static_cast<T*>(f.data) + l0 * f.row_stride + j0 * f.col_stride;
  if (f.row_stride == 1) {
    for (int64_t j = 0; j < columns; ++j) {
      T* run = p + j * f.col_stride;
      int64_t l = 0;
      for (; l + W <= n; l += W) store(run + l, load(panel + j * ld + l));
      if (l < n) store(run + l, load(panel + j * ld + l), n - l);
    }
  } else if (f.col_stride == 1) {
    for (int64_t j = 0; j < columns; j += W) {
      const int64_t wide = smaller<int64_t>(W, columns - j);
      for (int64_t l = 0; l < n; l += W) {
        F v[W] = {};
        for (int i = 0; i < wide; ++i) v[i] = load(panel + (j + i) * ld + l);
        transpose(v);
        const int64_t high = smaller<int64_t>(W, n - l);
        T* row = p + l * f.row_stride + j;
        if (wide == W)
          for (int i = 0; i < high; ++i) store(row + i * f.row_stride, v[i]);
        else
          for (int i = 0; i < high; ++i) store(row + i * f.row_stride, v[i], wide);
      }
    }
  } else {
    for (int64_t j = 0; j < columns; ++j)
      for (int64_t l = 0; l < n; ++l) from_float(p + l * f.row_stride + j * f.col_stride, panel[j * ld + l]);
  }
}

// The inverse: rounds once to the factor's type.
inline void store_panel(const MutableMatrix& f, int64_t l0, int64_t n, int64_t j0, int64_t columns, const float* panel,
                        int64_t ld) {
  with_type(f.dtype, [&](auto t) { store_panel_as<decltype(t)>(f, l0, n, j0, columns, panel, ld); });
}

// A small operand (sigma, core, bias, h) as fp32, element by element.
inline float element(DType dtype, const void* data, int64_t index) {
  float x = 0.0f;
  with_type(dtype, [&](auto t) { x = to_float(static_cast<const decltype(t)*>(data)[index]); });
  return x;
}

}  // namespace
}  // namespace svdkern
