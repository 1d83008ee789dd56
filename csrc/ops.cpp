// The private operators of svdkern on the LibTorch Stable ABI: checks, allocation and the call; the only file that sees
// torch. Python checks first and says it better; these checks are the second line: no input reads out of bounds.
//
// GPU launchers join here (their own STABLE_TORCH_LIBRARY_IMPL for CUDA) and their .cu files in setup.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "svdkern.h"

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

int32_t code_of(DType dtype) {
  static const int32_t codes[] = {aoti_torch_dtype_float32(), aoti_torch_dtype_bfloat16(), aoti_torch_dtype_float16(),
                                  aoti_torch_dtype_float64()};
  return codes[static_cast<int>(dtype)];
}

View look(const Tensor& tensor, const char* name, int64_t dim, bool allow_f64 = false) {
  View view;
  view.dim = tensor.dim();
  STD_TORCH_CHECK(view.dim == dim, name, " has ", view.dim, " dimensions, expected ", dim);
  STD_TORCH_CHECK(tensor.is_cpu(), name, " is not on the CPU, where this operator runs");
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

// Inputs that are absent become data == nullptr; an empty one that is there must not, so it points at something.
const void* present(const void* data) {
  static const char nothing[64] = {};
  return data ? data : nothing;
}

Matrix as_matrix(const View& v) { return {present(v.data), v.size[0], v.size[1], v.stride[0], v.stride[1], v.dtype}; }

Matrix matrix(const Tensor& t, const char* name) { return as_matrix(look(t, name, 2)); }
Matrix matrix(const MaybeTensor& t, const char* name) { return t.has_value() ? matrix(*t, name) : Matrix{}; }

Vector vector(const MaybeTensor& t, const char* name) {
  if (!t.has_value()) return {};
  const View v = look(*t, name, 1);
  return {present(v.data), v.size[0], v.stride[0], v.dtype};
}

// Activations (..., L) as rows of runs, `data == nullptr` where their strides do not allow it.
Matrix as_rows(const Tensor& t, const char* name) {
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
Matrix runs(const Tensor& t, const char* name, MaybeTensor& keep, bool any_shape = false) {
  STD_TORCH_CHECK(any_shape || t.dim() == 2, name, " has ", t.dim(), " dimensions, expected 2");
  const Matrix m = as_rows(t, name);
  if (m.data) return m;
  keep = torch::stable::contiguous(t);
  return as_rows(*keep, name);
}

// A weight is streamed along its unit stride: a copy where it has none.
Matrix streamable(const Tensor& t, const char* name, MaybeTensor& keep) {
  Matrix m = matrix(t, name);
  if (m.col_stride == 1 || m.row_stride == 1) return m;
  keep = torch::stable::contiguous(t);
  m = matrix(*keep, name);
  return m.col_stride = 1, m;
}

void expect(int64_t value, int64_t wanted, const char* what, const char* wanted_by) {
  STD_TORCH_CHECK(value == wanted, what, " is ", value, ", expected ", wanted, " (", wanted_by, ")");
}

void expect_type(DType dtype, DType wanted, const char* name, const char* wanted_by) {
  STD_TORCH_CHECK(dtype == wanted, name, " must have the dtype of ", wanted_by);
}

svdkern::Dropout dropout(const MaybeTensor& rng_state, int64_t threshold, int64_t row0 = 0) {
  STD_TORCH_CHECK(threshold >= 0 && threshold < 65536, "threshold is ", threshold, ", expected 0 to 65535");
  if (threshold == 0) return {};
  STD_TORCH_CHECK(rng_state.has_value(), "rng_state is None, expected int64 (seed, offset) with threshold ", threshold);
  STD_TORCH_CHECK(rng_state->is_cpu() && rng_state->scalar_type() == ScalarType::Long && rng_state->dim() == 1 &&
                      rng_state->size(0) == 2,
                  "rng_state must be an int64 CPU tensor of 2 elements, (seed, offset)");
  const int64_t* state = static_cast<const int64_t*>(rng_state->const_data_ptr());
  return {static_cast<uint64_t>(state[0]), static_cast<uint64_t>(state[rng_state->stride(0)]),
          static_cast<uint32_t>(threshold), row0};
}

float scale_of(const Tensor& scale) {
  STD_TORCH_CHECK(scale.is_cpu() && scale.scalar_type() == ScalarType::Float && scale.numel() == 1,
                  "scale must be a float32 CPU tensor of one element");
  return *static_cast<const float*>(scale.const_data_ptr());
}

Tensor empty(DType dtype, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                         strides.data(), code_of(dtype), aoti_torch_device_type_cpu(),
                                                         0, &handle));
  return Tensor(handle);
}

// A new (rows, cols) tensor, column-major if asked, and the kernels' view of it.
Tensor empty_matrix(DType dtype, int64_t rows, int64_t cols, bool column_major, MutableMatrix& view) {
  const int64_t row_stride = column_major ? 1 : cols, col_stride = column_major ? rows : 1;
  Tensor t = empty(dtype, {rows, cols}, {row_stride, col_stride});
  view = {const_cast<void*>(present(t.mutable_data_ptr())), rows, cols, row_stride, col_stride, dtype};
  return t;
}

// New activations (..., cols) with the leading sizes of `like`, and the kernels' view of them as rows.
Tensor empty_like_rows(const Tensor& like, const Matrix& rows, int64_t cols, MutableMatrix& view) {
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

bool column_major(const Matrix& f) { return f.row_stride == 1 && f.col_stride != 1; }

void parallel_for(int64_t begin, int64_t end, int64_t grain, svdkern::RangeBody body, void* context) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, body, context));
}

std::string names_of_isas(bool only_available) {
  svdkern::Isa isas[svdkern::max_isas];
  const int n = svdkern::list_isas(isas);
  std::string names;
  for (int i = 0; i < n; ++i) {
    if (only_available && !isas[i].available) continue;
    if (!names.empty()) names.push_back(',');
    names.append(isas[i].kernels->name);
  }
  return names;
}

const svdkern::Kernels& kernels() {
  static const svdkern::Kernels* chosen = nullptr;  // a throw below leaves it null: the next call says it again
  if (chosen != nullptr) return *chosen;
  const char* forced = std::getenv("SVDKERN_CPU_ISA");
  const svdkern::Kernels* found = svdkern::select_kernels(forced);
  STD_TORCH_CHECK(found != nullptr, "SVDKERN_CPU_ISA=", forced, " cannot run here, expected one of ",
                  names_of_isas(true));
  return *(chosen = found);
}

// What stands between h and z: sigma, core or nothing.
template <class Params>
void couple(Params& p, const MaybeTensor& sigma, const MaybeTensor& core, int64_t r) {
  p.sigma = vector(sigma, "sigma");
  if (p.sigma.data) expect(p.sigma.size, r, "the size of sigma", "the rank of u");
  p.core = matrix(core, "core");
  if (p.core.data) {
    STD_TORCH_CHECK(!p.sigma.data, "sigma and core exclude each other");
    expect(p.core.rows, r, "the number of rows of core", "the rank of u");
    expect(p.core.cols, r, "the number of columns of core", "the rank of u");
  }
}

std::tuple<Tensor, Tensor> cpu_forward(const Tensor& x, const MaybeTensor& weight, const Tensor& u,
                                       const MaybeTensor& sigma, const Tensor& v, const MaybeTensor& bias,
                                       const Tensor& scale, const MaybeTensor& core, const MaybeTensor& rng_state,
                                       int64_t threshold) {
  MaybeTensor keep_x, keep_w;
  svdkern::ForwardParams p;
  p.x = runs(x, "x", keep_x, true);
  p.u = matrix(u, "u");
  p.v = matrix(v, "v");
  const int64_t n = p.v.rows, r = p.u.cols;
  expect(p.u.rows, p.x.cols, "the number of rows of u", "the width of x");
  expect(p.v.cols, r, "the number of columns of v", "the rank of u");
  if (weight.has_value()) {
    p.weight = streamable(*weight, "weight", keep_w);
    expect(p.weight.rows, n, "the number of rows of weight", "the rows of v");
    expect(p.weight.cols, p.x.cols, "the number of columns of weight", "the width of x");
    expect_type(p.weight.dtype, p.x.dtype, "weight", "x");
  }
  couple(p, sigma, core, r);
  p.bias = vector(bias, "bias");
  if (p.bias.data) {
    expect(p.bias.size, n, "the size of bias", "the rows of v");
    expect_type(p.bias.dtype, p.x.dtype, "bias", "x");
  }
  p.scale = scale_of(scale);
  p.dropout = dropout(rng_state, threshold);
  MutableMatrix h_view;
  Tensor y = empty_like_rows(x, p.x, n, p.y), h = empty_matrix(DType::f32, p.x.rows, r, false, h_view);
  p.h = static_cast<float*>(h_view.data);
  p.parallel_for = parallel_for, p.threads = torch::stable::get_num_threads();
  kernels().forward(p);
  return {y, h};
}

std::vector<Tensor> cpu_backward(const Tensor& dy, const MaybeTensor& x, const MaybeTensor& weight, const Tensor& u,
                                 const MaybeTensor& sigma, const Tensor& v, const Tensor& scale,
                                 const MaybeTensor& core, const MaybeTensor& h, const MaybeTensor& rng_state,
                                 int64_t threshold, int64_t mask) {
  enum { wants_x = 1, wants_u = 2, wants_sigma = 4, wants_v = 8, wants_bias = 16, wants_scale = 32, wants_core = 64 };
  STD_TORCH_CHECK(mask >= 0 && mask < 128, "mask is ", mask, ", expected 0 to 127");
  MaybeTensor keep_dy, keep_x, keep_w;
  svdkern::BackwardParams p;
  p.dy = runs(dy, "dy", keep_dy, true);
  p.u = matrix(u, "u");
  p.v = matrix(v, "v");
  const int64_t rows = p.dy.rows, n = p.dy.cols, k = p.u.rows, r = p.u.cols;
  expect(p.v.rows, n, "the number of rows of v", "the width of dy");
  expect(p.v.cols, r, "the number of columns of v", "the rank of u");
  if (weight.has_value() && mask & wants_x) {
    p.weight = streamable(*weight, "weight", keep_w);
    expect(p.weight.rows, n, "the number of rows of weight", "the width of dy");
    expect(p.weight.cols, k, "the number of columns of weight", "the rows of u");
    expect_type(p.weight.dtype, p.dy.dtype, "weight", "dy");
  }
  couple(p, sigma, core, r);
  STD_TORCH_CHECK(!(mask & wants_sigma) || p.sigma.data, "mask asks for the gradient of sigma, which is None");
  STD_TORCH_CHECK(!(mask & wants_core) || p.core.data, "mask asks for the gradient of core, which is None");
  p.scale = scale_of(scale);
  p.dropout = dropout(rng_state, threshold);
  if (mask & wants_u) {
    STD_TORCH_CHECK(x.has_value(), "x is None, expected with the gradient of u");
    p.x = runs(*x, "x", keep_x, true);
    expect(p.x.rows, rows, "the number of rows of x", "the rows of dy");
    expect(p.x.cols, k, "the width of x", "the rows of u");
    expect_type(p.x.dtype, p.dy.dtype, "x", "dy");
  }
  if (mask & (wants_sigma | wants_v | wants_scale | wants_core)) {
    STD_TORCH_CHECK(h.has_value(), "h is None, expected with the gradients of sigma, v, scale and core");
    p.h = matrix(*h, "h");
    expect(p.h.rows, rows, "the number of rows of h", "the rows of dy");
    expect(p.h.cols, r, "the number of columns of h", "the rank of u");
    expect_type(p.h.dtype, DType::f32, "h", "the accumulators, float32");
  }
  std::vector<Tensor> gradients;
  gradients.reserve(7);
  if (mask & wants_x) gradients.push_back(empty_like_rows(dy, p.dy, k, p.dx));
  if (mask & wants_u) gradients.push_back(empty_matrix(p.u.dtype, k, r, column_major(p.u), p.du));
  const auto add_vector = [&](DType dtype, int64_t size, MutableVector& view) {
    Tensor t = empty(dtype, {size}, {1});
    view = {const_cast<void*>(present(t.mutable_data_ptr())), size, dtype};
    gradients.push_back(t);
  };
  if (mask & wants_sigma) add_vector(p.sigma.dtype, r, p.dsigma);
  if (mask & wants_v) gradients.push_back(empty_matrix(p.v.dtype, n, r, column_major(p.v), p.dv));
  if (mask & wants_bias) add_vector(p.dy.dtype, n, p.dbias);
  if (mask & wants_scale) {
    Tensor t = empty(DType::f32, {}, {});
    p.dscale = static_cast<float*>(t.mutable_data_ptr());
    gradients.push_back(t);
  }
  if (mask & wants_core) gradients.push_back(empty_matrix(p.core.dtype, r, r, column_major(p.core), p.dcore));
  p.parallel_for = parallel_for, p.threads = torch::stable::get_num_threads();
  kernels().backward(p);
  return gradients;
}

Tensor cpu_shrink(const Tensor& a, const Tensor& f, const MaybeTensor& rng_state, int64_t threshold) {
  MaybeTensor keep;
  svdkern::ShrinkParams p;
  p.a = runs(a, "a", keep);
  p.f = matrix(f, "f");
  expect(p.f.rows, p.a.cols, "the number of rows of f", "the width of a");
  p.dropout = dropout(rng_state, threshold);
  MutableMatrix view;
  Tensor out = empty_matrix(DType::f32, p.a.rows, p.f.cols, false, view);
  p.out = static_cast<float*>(view.data);
  p.parallel_for = parallel_for, p.threads = torch::stable::get_num_threads();
  kernels().shrink(p);
  return out;
}

Tensor cpu_outer(const Tensor& a, const Tensor& q, const Tensor& f, const MaybeTensor& rng_state, int64_t threshold) {
  MaybeTensor keep_a;
  svdkern::OuterParams p;
  p.a = runs(a, "a", keep_a);
  const Tensor dense_q = q.is_contiguous() ? q : torch::stable::contiguous(q);
  p.q = matrix(dense_q, "q");
  const Matrix factor = matrix(f, "f");
  expect(factor.rows, p.a.cols, "the number of rows of f", "the width of a");
  expect(p.q.rows, p.a.rows, "the number of rows of q", "the rows of a");
  expect(p.q.cols, factor.cols, "the number of columns of q", "the rank of f");
  expect_type(p.q.dtype, DType::f32, "q", "the accumulators, float32");
  p.dropout = dropout(rng_state, threshold);
  Tensor out = empty_matrix(factor.dtype, factor.rows, factor.cols, column_major(factor), p.out);
  p.parallel_for = parallel_for, p.threads = torch::stable::get_num_threads();
  kernels().outer(p);
  return out;
}

Tensor cpu_dropout(const Tensor& x, const Tensor& rng_state, int64_t threshold, int64_t row0) {
  MaybeTensor keep;
  svdkern::DropoutParams p;
  p.x = runs(x, "x", keep);
  STD_TORCH_CHECK(row0 >= 0, "row0 is ", row0, ", expected at least 0");
  p.dropout = dropout(rng_state, threshold, row0);
  Tensor out = empty_matrix(p.x.dtype, p.x.rows, p.x.cols, false, p.out);
  p.parallel_for = parallel_for;
  kernels().dropout(p);
  return out;
}

Tensor cpu_linear(const Tensor& a, const MaybeTensor& w, const MaybeTensor& z, const Tensor& f, const MaybeTensor& bias,
                  const MaybeTensor& rng_state, int64_t threshold) {
  MaybeTensor keep_a, keep_w, keep_z;
  svdkern::LinearParams p;
  p.a = runs(a, "a", keep_a);
  p.f = matrix(f, "f");
  if (w.has_value()) {
    p.w = streamable(*w, "w", keep_w);
    expect(p.w.rows, p.a.cols, "the number of rows of w", "the width of a");
    expect(p.w.cols, p.f.rows, "the number of columns of w", "the rows of f");
    expect_type(p.w.dtype, p.a.dtype, "w", "a");
  }
  if (z.has_value()) {
    if (!z->is_contiguous()) keep_z = torch::stable::contiguous(*z);
    p.z = matrix(keep_z.has_value() ? *keep_z : *z, "z");
    expect(p.z.rows, p.a.rows, "the number of rows of z", "the rows of a");
    expect(p.z.cols, p.f.cols, "the number of columns of z", "the rank of f");
    expect_type(p.z.dtype, DType::f32, "z", "the accumulators, float32");
  }
  p.bias = vector(bias, "bias");
  if (p.bias.data) {
    expect(p.bias.size, p.f.rows, "the size of bias", "the rows of f");
    expect_type(p.bias.dtype, p.a.dtype, "bias", "a");
  }
  p.dropout = dropout(rng_state, threshold);
  Tensor out = empty_matrix(p.a.dtype, p.a.rows, p.f.rows, false, p.out);
  p.parallel_for = parallel_for, p.threads = torch::stable::get_num_threads();
  kernels().linear(p);
  return out;
}

Tensor cpu_residual(const Tensor& weight, const Tensor& u, const MaybeTensor& sigma, const Tensor& v, double scale) {
  svdkern::ResidualParams p;
  p.weight = as_matrix(look(weight, "weight", 2, true));
  p.u = as_matrix(look(u, "u", 2, true));
  p.v = as_matrix(look(v, "v", 2, true));
  expect(p.u.rows, p.weight.cols, "the number of rows of u", "the columns of weight");
  expect(p.v.rows, p.weight.rows, "the number of rows of v", "the rows of weight");
  expect(p.v.cols, p.u.cols, "the number of columns of v", "the rank of u");
  if (sigma.has_value()) {
    const View s = look(*sigma, "sigma", 1, true);
    expect(s.size[0], p.u.cols, "the size of sigma", "the rank of u");
    p.sigma = {present(s.data), s.size[0], s.stride[0], s.dtype};
  }
  p.scale = scale;
  Tensor out = empty_matrix(p.weight.dtype, p.weight.rows, p.weight.cols, false, p.out);
  p.parallel_for = parallel_for;
  svdkern::residual(p);
  return out;
}

std::string cpu_isa() { return kernels().name; }
std::string cpu_isas() { return names_of_isas(false); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(svdkern, m) {
  m.def(
      "_cpu_forward(Tensor x, Tensor? weight, Tensor u, Tensor? sigma, Tensor v, Tensor? bias, Tensor scale, "
      "Tensor? core, Tensor? rng_state, int threshold) -> (Tensor, Tensor)");
  m.def(
      "_cpu_backward(Tensor dy, Tensor? x, Tensor? weight, Tensor u, Tensor? sigma, Tensor v, Tensor scale, "
      "Tensor? core, Tensor? h, Tensor? rng_state, int threshold, int mask) -> Tensor[]");
  m.def("_cpu_shrink(Tensor a, Tensor f, Tensor? rng_state, int threshold) -> Tensor");
  m.def("_cpu_outer(Tensor a, Tensor q, Tensor f, Tensor? rng_state, int threshold) -> Tensor");
  m.def("_cpu_dropout(Tensor x, Tensor rng_state, int threshold, int row0) -> Tensor");
  m.def(
      "_cpu_linear(Tensor a, Tensor? w, Tensor? z, Tensor f, Tensor? bias, Tensor? rng_state, int threshold) -> "
      "Tensor");
  m.def("_cpu_residual(Tensor weight, Tensor u, Tensor? sigma, Tensor v, float scale) -> Tensor");
  m.def("_cpu_isa() -> str");
  m.def("_cpu_isas() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(svdkern, CPU, m) {
  m.impl("_cpu_forward", TORCH_BOX(&cpu_forward));
  m.impl("_cpu_backward", TORCH_BOX(&cpu_backward));
  m.impl("_cpu_shrink", TORCH_BOX(&cpu_shrink));
  m.impl("_cpu_outer", TORCH_BOX(&cpu_outer));
  m.impl("_cpu_dropout", TORCH_BOX(&cpu_dropout));
  m.impl("_cpu_linear", TORCH_BOX(&cpu_linear));
  m.impl("_cpu_residual", TORCH_BOX(&cpu_residual));
}

STABLE_TORCH_LIBRARY_IMPL(svdkern, CompositeExplicitAutograd, m) {
  m.impl("_cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("_cpu_isas", TORCH_BOX(&cpu_isas));
}
