// Tensors of the LibTorch Stable ABI as the plain views of svdkern.h, and new ones for results.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "svdkern.h"

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // torch 2.11's name for it
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace {

using svdkern::DType;
using svdkern::Matrix;
using svdkern::MutableMatrix;
using svdkern::MutableVector;
using svdkern::Vector;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// What one look at a tensor costs is several calls into libtorch: done once for each.
struct View {
  const void* data = nullptr;
  const int64_t *size = nullptr, *stride = nullptr;
  int64_t dim = 0;
  DType dtype = DType::f32;
};

inline int32_t code_of(DType dtype) {
  static const int32_t codes[] = {aoti_torch_dtype_float32(), aoti_torch_dtype_bfloat16(), aoti_torch_dtype_float16(),
                                  aoti_torch_dtype_float64()};
  return codes[static_cast<int>(dtype)];
}

inline View look_anywhere(const Tensor& tensor, const char* name, int64_t dim, bool allow_f64 = false) {
  View view;
  view.dim = tensor.dim();
  STD_TORCH_CHECK(view.dim == dim, name, " has ", view.dim, " dimensions, expected ", dim);
  int32_t code = -1;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &code));
  int found = 0;
  while (found < 4 && code_of(static_cast<DType>(found)) != code) ++found;
  STD_TORCH_CHECK(found < 3 || (found == 3 && allow_f64), name, " has a dtype without kernels, expected float32, ",
                  "bfloat16 or float16", allow_f64 ? " or float64" : "");
  view.dtype = static_cast<DType>(found);
  int64_t *sizes = nullptr, *strides = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor.get(), &sizes));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor.get(), &strides));
  view.size = sizes, view.stride = strides;
  view.data = tensor.const_data_ptr();
  return view;
}

inline View look(const Tensor& tensor, const char* name, int64_t dim, bool allow_f64 = false) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, " is not on the CPU, where this operator runs");
  return look_anywhere(tensor, name, dim, allow_f64);
}

// Inputs that are absent become data == nullptr; an empty one that is there must not, so it points at something.
inline const void* present(const void* data) {
  static const char nothing[64] = {};
  return data ? data : nothing;
}

inline Matrix as_matrix(const View& v) {
  return {present(v.data), v.size[0], v.size[1], v.stride[0], v.stride[1], v.dtype};
}

inline Matrix matrix(const Tensor& t, const char* name) { return as_matrix(look(t, name, 2)); }
inline Matrix matrix(const MaybeTensor& t, const char* name) { return t.has_value() ? matrix(*t, name) : Matrix{}; }

inline Vector vector(const MaybeTensor& t, const char* name) {
  if (!t.has_value()) return {};
  const View v = look(*t, name, 1);
  return {present(v.data), v.size[0], v.stride[0], v.dtype};
}

// Activations (..., L) as rows of runs, `data == nullptr` where their strides do not allow it.
inline Matrix as_rows(const Tensor& t, const char* name) {
  const int64_t dim = t.dim();
  STD_TORCH_CHECK(dim >= 1, name, " has 0 dimensions, expected (..., width)");
  const View view = look(t, name, dim);
  const int64_t width = view.size[dim - 1];
  Matrix m{present(view.data), 1, width, width, 1, view.dtype};
  bool foldable = width <= 1 || view.stride[dim - 1] == 1;
  for (int64_t i = dim - 2; i >= 0; --i) {
    if (view.size[i] != 1) {
      if (m.rows == 1) m.row_stride = view.stride[i];
      foldable = foldable && view.stride[i] == m.rows * m.row_stride;
    }
    m.rows *= view.size[i];
  }
  if (!foldable && m.rows * m.cols != 0) m.data = nullptr;
  return m;
}

// The same of a copy where it must be; `keep` owns that.
inline Matrix runs(const Tensor& t, const char* name, MaybeTensor& keep, bool any_shape = false) {
  STD_TORCH_CHECK(any_shape || t.dim() == 2, name, " has ", t.dim(), " dimensions, expected 2");
  const Matrix m = as_rows(t, name);
  if (m.data) return m;
  keep = torch::stable::contiguous(t);
  return as_rows(*keep, name);
}

// A weight is streamed along its unit stride: a copy where it has none.
inline Matrix streamable(const Tensor& t, const char* name, MaybeTensor& keep) {
  Matrix m = matrix(t, name);
  if (m.col_stride == 1 || m.row_stride == 1) return m;
  keep = torch::stable::contiguous(t);
  m = matrix(*keep, name);
  return m.col_stride = 1, m;
}

inline void expect(int64_t value, int64_t wanted, const char* what, const char* wanted_by) {
  STD_TORCH_CHECK(value == wanted, what, " is ", value, ", expected ", wanted, " (", wanted_by, ")");
}

inline void expect_type(DType dtype, DType wanted, const char* name, const char* wanted_by) {
  STD_TORCH_CHECK(dtype == wanted, name, " must have the dtype of ", wanted_by);
}

inline Tensor empty(DType dtype, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                         strides.data(), code_of(dtype), aoti_torch_device_type_cpu(),
                                                         0, &handle));
  return Tensor(handle);
}

// A new (rows, cols) tensor, column-major if asked, and the kernels' view of it.
inline Tensor empty_matrix(DType dtype, int64_t rows, int64_t cols, bool column_major, MutableMatrix& view) {
  const int64_t row_stride = column_major ? 1 : cols, col_stride = column_major ? rows : 1;
  Tensor t = empty(dtype, {rows, cols}, {row_stride, col_stride});
  view = {const_cast<void*>(present(t.mutable_data_ptr())), rows, cols, row_stride, col_stride, dtype};
  return t;
}

// New activations (..., cols) with the leading sizes of `like`, and the kernels' view of them as rows.
inline Tensor empty_like_rows(const Tensor& like, const Matrix& rows, int64_t cols, MutableMatrix& view) {
  int64_t* sizes = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(like.get(), &sizes));
  const int64_t dim = like.dim();
  std::vector<int64_t> size(sizes, sizes + dim), stride(dim, 1);
  size[dim - 1] = cols;
  for (int64_t i = dim - 2; i >= 0; --i) stride[i] = stride[i + 1] * (size[i + 1] > 1 ? size[i + 1] : 1);
  Tensor t = empty(rows.dtype, size, stride);
  view = {const_cast<void*>(present(t.mutable_data_ptr())), rows.rows, cols, cols, 1, rows.dtype};
  return t;
}

inline bool column_major(const Matrix& f) { return f.row_stride == 1 && f.col_stride != 1; }

}  // namespace
