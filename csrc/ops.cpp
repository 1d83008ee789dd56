// The private operators of svdkern on the LibTorch Stable ABI: checks, allocation and the call; with tensors.h the only
// file that sees torch. Python checks first and says it better; these checks are the second line: no input reads out of
// bounds.
//
// The operators of the CUDA kernels are declared here, so that they can be named in any build, and implemented in
// csrc/cuda/ops.cpp. SVDKERN_CUDA_BUILD: the compiler of the CUDA kernels and their GPUs, "" where there are none.
#include <cstdlib>
#include <string>
#include <tuple>

#include "tensors.h"

namespace {

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

svdkern::Modulation modulation(const MaybeTensor& sigma, const Tensor& scale, const MaybeTensor& core,
                               const MaybeTensor& gate, int64_t rows, int64_t r) {
  svdkern::Modulation by;
  by.sigma = vector(sigma, "sigma");
  if (by.sigma.data) expect(by.sigma.size, r, "the size of sigma", "the rank of u");
  by.core = matrix(core, "core");
  if (by.core.data) {
    STD_TORCH_CHECK(!by.sigma.data, "sigma and core exclude each other");
    expect(by.core.rows, r, "the number of rows of core", "the rank of u");
    expect(by.core.cols, r, "the number of columns of core", "the rank of u");
  }
  by.gate = matrix(gate, "gate");
  if (by.gate.data) {
    if (by.gate.rows != 1) expect(by.gate.rows, rows, "the number of rows of gate", "1, or the rows of x");
    expect(by.gate.cols, r, "the number of columns of gate", "the rank of u");
    expect_type(by.gate.dtype, DType::f32, "gate", "the accumulators, float32");
  }
  STD_TORCH_CHECK(scale.is_cpu() && scale.scalar_type() == ScalarType::Float && scale.numel() == 1,
                  "scale must be a float32 CPU tensor of one element");
  by.scale = *static_cast<const float*>(scale.const_data_ptr());
  return by;
}

std::tuple<Tensor, Tensor> cpu_forward(const Tensor& x, const MaybeTensor& weight, const Tensor& u,
                                       const MaybeTensor& sigma, const Tensor& v, const MaybeTensor& bias,
                                       const Tensor& scale, const MaybeTensor& core, const MaybeTensor& gate,
                                       const MaybeTensor& rng_state, int64_t threshold) {
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
  p.by = modulation(sigma, scale, core, gate, p.x.rows, r);
  p.bias = vector(bias, "bias");
  if (p.bias.data) {
    expect(p.bias.size, n, "the size of bias", "the rows of v");
    expect_type(p.bias.dtype, p.x.dtype, "bias", "x");
  }
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
                                 const MaybeTensor& core, const MaybeTensor& gate, const MaybeTensor& h,
                                 const MaybeTensor& rng_state, int64_t threshold, int64_t mask) {
  enum {
    wants_x = 1,
    wants_u = 2,
    wants_sigma = 4,
    wants_v = 8,
    wants_bias = 16,
    wants_scale = 32,
    wants_core = 64,
    wants_gate = 128
  };
  STD_TORCH_CHECK(mask >= 0 && mask < 256, "mask is ", mask, ", expected 0 to 255");
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
  p.by = modulation(sigma, scale, core, gate, rows, r);
  STD_TORCH_CHECK(!(mask & wants_sigma) || p.by.sigma.data, "mask asks for the gradient of sigma, which is None");
  STD_TORCH_CHECK(!(mask & wants_core) || p.by.core.data, "mask asks for the gradient of core, which is None");
  STD_TORCH_CHECK(!(mask & wants_gate) || p.by.gate.data, "mask asks for the gradient of gate, which is None");
  p.dropout = dropout(rng_state, threshold);
  if (mask & wants_u) {
    STD_TORCH_CHECK(x.has_value(), "x is None, expected with the gradient of u");
    p.x = runs(*x, "x", keep_x, true);
    expect(p.x.rows, rows, "the number of rows of x", "the rows of dy");
    expect(p.x.cols, k, "the width of x", "the rows of u");
    expect_type(p.x.dtype, p.dy.dtype, "x", "dy");
  }
  if (mask & (wants_sigma | wants_v | wants_scale | wants_core | wants_gate)) {
    STD_TORCH_CHECK(h.has_value(), "h is None, expected with the gradients of sigma, v, scale, core and gate");
    p.h = matrix(*h, "h");
    expect(p.h.rows, rows, "the number of rows of h", "the rows of dy");
    expect(p.h.cols, r, "the number of columns of h", "the rank of u");
    expect_type(p.h.dtype, DType::f32, "h", "the accumulators, float32");
  }
  std::vector<Tensor> gradients;
  gradients.reserve(8);
  if (mask & wants_x) gradients.push_back(empty_like_rows(dy, p.dy, k, p.dx));
  if (mask & wants_u) gradients.push_back(empty_matrix(p.u.dtype, k, r, column_major(p.u), p.du));
  const auto add_vector = [&](DType dtype, int64_t size, MutableVector& view) {
    Tensor t = empty(dtype, {size}, {1});
    view = {const_cast<void*>(present(t.mutable_data_ptr())), size, dtype};
    gradients.push_back(t);
  };
  if (mask & wants_sigma) add_vector(p.by.sigma.dtype, r, p.dsigma);
  if (mask & wants_v) gradients.push_back(empty_matrix(p.v.dtype, n, r, column_major(p.v), p.dv));
  if (mask & wants_bias) add_vector(p.dy.dtype, n, p.dbias);
  if (mask & wants_scale) {
    Tensor t = empty(DType::f32, {}, {});
    p.dscale = static_cast<float*>(t.mutable_data_ptr());
    gradients.push_back(t);
  }
  if (mask & wants_core) gradients.push_back(empty_matrix(p.by.core.dtype, r, r, column_major(p.by.core), p.dcore));
  if (mask & wants_gate) {
    MutableMatrix view;
    gradients.push_back(empty_matrix(DType::f32, rows, r, false, view));
    p.dgate = static_cast<float*>(view.data);
  }
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
  kernels().residual(p);
  return out;
}

std::tuple<Tensor, Tensor> cpu_normal(const Tensor& a, const Tensor& x, double scale, bool rough) {
  svdkern::NormalParams p;
  MaybeTensor keep_a, keep_x;
  p.a = streamable(a, "a", keep_a);
  p.x = runs(x, "x", keep_x);
  expect(p.x.rows, p.a.cols, "the number of rows of x", "the width of a");
  expect_type(p.x.dtype, DType::f32, "x", "the accumulators, float32");
  p.scale = static_cast<float>(scale), p.rough = rough;
  MutableMatrix y_view, z_view;
  Tensor y = empty_matrix(DType::f32, p.a.rows, p.x.cols, false, y_view);
  Tensor z = empty_matrix(DType::f32, p.a.cols, p.x.cols, false, z_view);
  p.y = static_cast<float*>(y_view.data), p.z = static_cast<float*>(z_view.data);
  p.parallel_for = parallel_for;
  kernels().normal(p);
  return {y, z};
}

Tensor cpu_gram(const Tensor& a) {
  svdkern::GramParams p;
  MaybeTensor keep;
  p.a = streamable(a, "a", keep);
  expect_type(p.a.dtype, DType::bf16, "a", "the units, bfloat16");
  STD_TORCH_CHECK(kernels().gram != nullptr, "_cpu_gram needs the amx_bf16 kernels, these are ", kernels().name);
  MutableMatrix view;
  Tensor out = empty_matrix(DType::f32, p.a.cols, p.a.cols, false, view);
  p.out = static_cast<float*>(view.data);
  if (p.a.rows == 0) std::memset(p.out, 0, p.a.cols * p.a.cols * sizeof(float));
  p.parallel_for = parallel_for;
  kernels().gram(p);
  return out;
}

double cpu_energy(const Tensor& a, double scale) {
  svdkern::EnergyParams p;
  MaybeTensor keep;
  p.a = runs(a, "a", keep);
  p.scale = static_cast<float>(scale);
  double out = 0;
  p.out = &out;
  p.parallel_for = parallel_for;
  kernels().energy(p);
  return out;
}

void cpu_sketch(Tensor out, int64_t seed, int64_t first) {
  const View view = look(out, "out", 2, true);
  STD_TORCH_CHECK(view.dtype == DType::f32 || view.dtype == DType::f64, "out must be float32 or float64");
  STD_TORCH_CHECK(out.is_contiguous(), "out must be contiguous");
  STD_TORCH_CHECK(first >= 0, "first is ", first, ", expected >= 0");
  svdkern::SketchParams p;
  p.seed = static_cast<uint64_t>(seed), p.first = first;
  p.out = {out.mutable_data_ptr(), view.size[0], view.size[1], view.size[1], 1, view.dtype};
  p.parallel_for = parallel_for;
  kernels().sketch(p);
}

std::string cpu_isa() { return kernels().name; }
std::string cpu_isas() { return names_of_isas(false); }
std::string cuda_build() { return SVDKERN_CUDA_BUILD; }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(svdkern, m) {
  m.def(
      "_cpu_forward(Tensor x, Tensor? weight, Tensor u, Tensor? sigma, Tensor v, Tensor? bias, Tensor scale, "
      "Tensor? core, Tensor? gate, Tensor? rng_state, int threshold) -> (Tensor, Tensor)");
  m.def(
      "_cpu_backward(Tensor dy, Tensor? x, Tensor? weight, Tensor u, Tensor? sigma, Tensor v, Tensor scale, "
      "Tensor? core, Tensor? gate, Tensor? h, Tensor? rng_state, int threshold, int mask) -> Tensor[]");
  m.def("_cpu_shrink(Tensor a, Tensor f, Tensor? rng_state, int threshold) -> Tensor");
  m.def("_cpu_outer(Tensor a, Tensor q, Tensor f, Tensor? rng_state, int threshold) -> Tensor");
  m.def("_cpu_dropout(Tensor x, Tensor rng_state, int threshold, int row0) -> Tensor");
  m.def(
      "_cpu_linear(Tensor a, Tensor? w, Tensor? z, Tensor f, Tensor? bias, Tensor? rng_state, int threshold) -> "
      "Tensor");
  m.def("_cpu_residual(Tensor weight, Tensor u, Tensor? sigma, Tensor v, float scale) -> Tensor");
  m.def("_cpu_normal(Tensor a, Tensor x, float scale, bool rough) -> (Tensor, Tensor)");
  m.def("_cpu_gram(Tensor a) -> Tensor");
  m.def("_cpu_energy(Tensor a, float scale) -> float");
  m.def("_cpu_sketch(Tensor(a!) out, int seed, int first) -> ()");
  m.def(
      "_cuda_pack(Tensor first, Tensor(a!) first_out, bool first_rows, Tensor? second, Tensor(b!)? second_out, "
      "bool second_rows, Tensor(c!)? control) -> ()");
  m.def(
      "_cuda_shrink(Tensor a, Tensor factor, int r, Tensor? sigma, Tensor? core, Tensor? gate, bool gate_first, "
      "Tensor? scale, float scale_value, Tensor? rng_state, int threshold, Tensor(a!)? h, Tensor(b!)? z, "
      "Tensor(c!)? partial, Tensor(d!)? counters) -> ()");
  m.def(
      "_cuda_outer(Tensor a, Tensor q, int r, Tensor? rng_state, int threshold, Tensor(a!) out, Tensor(b!)? partial, "
      "Tensor(c!)? counters) -> ()");
  m.def(
      "_cuda_linear(Tensor a, Tensor? w, Tensor? z, Tensor? factor, int r, Tensor? bias, Tensor? rng_state, "
      "int threshold, Tensor(a!) out) -> ()");
  m.def(
      "_cuda_small_shrink(Tensor a, Tensor factor, Tensor? rng_state, int threshold, Tensor(a!) sums, "
      "Tensor(b!)? control) -> ()");
  m.def(
      "_cuda_small_linear(Tensor a, Tensor? w, Tensor? sums, Tensor? factor, Tensor? sigma, Tensor? core, "
      "Tensor? gate, bool gate_first, Tensor? scale, float scale_value, Tensor? bias, Tensor? rng_state, "
      "int threshold, Tensor(a!)? h, Tensor(b!)? z, Tensor(c!) out, Tensor(d!)? partial, Tensor(e!)? counters) -> ()");
  m.def(
      "_cuda_forward(Tensor x, Tensor columns, int r, Tensor? sigma, Tensor? core, Tensor? gate, Tensor? scale, "
      "float scale_value, Tensor? rng_state, int threshold, Tensor w, Tensor rows, Tensor? bias, Tensor(a!) h, "
      "Tensor(b!) z, Tensor(c!) control, Tensor(d!) y) -> bool");
  m.def("_cuda_probe(Tensor on) -> str");
  m.def("_cuda_build() -> str");
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
  m.impl("_cpu_normal", TORCH_BOX(&cpu_normal));
  m.impl("_cpu_gram", TORCH_BOX(&cpu_gram));
  m.impl("_cpu_energy", TORCH_BOX(&cpu_energy));
  m.impl("_cpu_sketch", TORCH_BOX(&cpu_sketch));
}

STABLE_TORCH_LIBRARY_IMPL(svdkern, CompositeExplicitAutograd, m) {
  m.impl("_cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("_cpu_isas", TORCH_BOX(&cpu_isas));
  m.impl("_cuda_build", TORCH_BOX(&cuda_build));
}
