// The operators of the CUDA kernels on the LibTorch Stable ABI: checks and the call, on the current stream. They
// allocate nothing: results and workspace are arguments, which the schemas mark as written. Tensors are of sizes other
// than zero.
//
// SVDKERN_CUDA_KEY is the dispatch key that they serve. The tests build this file for CPU tensors, with a CUDA runtime
// that hands every launch to the PTX emulator: what they test is this code, the launchers' and the kernels'.
#include <dlfcn.h>

#include <initializer_list>
#include <string>

#include "../tensors.h"
#include "params.h"

#ifndef SVDKERN_CUDA_KEY
#define SVDKERN_CUDA_KEY CUDA
#endif

namespace {

using svdkern::cuda::ceil_div;

// The device that all tensors of a call are on.
struct Device {
  const Tensor& first;

  View look(const Tensor& t, const char* name, int64_t dim, bool allow_f64 = false) const {
    STD_TORCH_CHECK(t.is_cpu() == first.is_cpu() && t.get_device_index() == first.get_device_index(), name,
                    " is on another device than the first argument");
    return look_anywhere(t, name, dim, allow_f64);
  }

  // A contiguous tensor of these sizes, that kernels write or read as they are.
  void* dense(const MaybeTensor& t, const char* name, std::initializer_list<int64_t> sizes, DType dtype) const {
    if (!t.has_value()) return nullptr;
    const View v = look(*t, name, static_cast<int64_t>(sizes.size()));
    int64_t i = static_cast<int64_t>(sizes.size()), stride = 1;
    for (auto size = sizes.end(); size != sizes.begin();) {
      expect(v.size[--i], *--size, name, "as its size");
      STD_TORCH_CHECK(v.size[i] == 1 || v.stride[i] == stride, name, " is not contiguous");
      stride *= v.size[i];
    }
    expect_type(v.dtype, dtype, name, "what the kernel writes or reads there");
    return const_cast<void*>(v.data);
  }

  int32_t* counters(const MaybeTensor& t, const char* name, int64_t least) const {
    STD_TORCH_CHECK(t.has_value() && t->scalar_type() == ScalarType::Int && t->is_contiguous() && t->numel() >= least,
                    name, " must be a contiguous int32 tensor of at least ", least, " elements");
    return static_cast<int32_t*>(t->mutable_data_ptr());
  }

  // The workspace of split sums of an output (lines, r); none: one split.
  svdkern::cuda::Splits splits(const MaybeTensor& partial, const MaybeTensor& counted, int lines, int r) const {
    if (!partial.has_value()) return {};
    svdkern::cuda::Splits s;
    const int64_t count = partial->size(0), tiles = static_cast<int64_t>(ceil_div(lines, svdkern::cuda::tile_lines)) *
                                                    ceil_div(r, svdkern::cuda::tile_ranks);
    STD_TORCH_CHECK(count > 0 && count < 65536, "partial is for ", count, " splits, expected 1 to 65535");
    s.partial = static_cast<float*>(dense(partial, "partial", {count, lines, svdkern::cuda::padded(r)}, DType::f32));
    s.counters = counters(counted, "counters", tiles), s.splits = static_cast<int>(count);
    return s;
  }

  svdkern::cuda::Epilogue epilogue(const MaybeTensor& sigma, const MaybeTensor& core, const MaybeTensor& gate,
                                   bool gate_first, const MaybeTensor& scale, double scale_value, int64_t rows,
                                   int64_t r) const {
    svdkern::cuda::Epilogue by;
    if (sigma.has_value()) {
      const View v = look(*sigma, "sigma", 1, true);
      expect(v.size[0], r, "the size of sigma", "r");
      by.sigma = {v.data, v.size[0], v.stride[0], v.dtype};
    }
    if (core.has_value()) {
      const View v = look(*core, "core", 2, true);
      expect(v.size[0], r, "the number of rows of core", "r");
      expect(v.size[1], r, "the number of columns of core", "r");
      STD_TORCH_CHECK(r <= svdkern::cuda::tile_ranks, "a core of r = ", r, ", expected at most ",
                      svdkern::cuda::tile_ranks);
      by.core = as_matrix(v);
    }
    by.gate = static_cast<const float*>(dense(gate, "gate", {rows, r}, DType::f32));
    by.gate_first = gate_first, by.scale.value = static_cast<float>(scale_value);
    if (scale.has_value()) {
      const View v = look(*scale, "scale", 0, true);
      by.scale.data = v.data, by.scale.dtype = v.dtype;
    }
    return by;
  }

  svdkern::cuda::Keep keep(const MaybeTensor& rng_state, int64_t threshold) const {
    STD_TORCH_CHECK(threshold >= 0 && threshold < 65536, "threshold is ", threshold, ", expected 0 to 65535");
    if (threshold == 0) return {};
    STD_TORCH_CHECK(rng_state.has_value() && rng_state->scalar_type() == ScalarType::Long && rng_state->numel() == 2 &&
                        rng_state->is_contiguous() && rng_state->is_cpu() == first.is_cpu(),
                    "rng_state must be a contiguous int64 tensor of 2 elements, (seed, offset), on x's device");
    return {static_cast<const int64_t*>(rng_state->const_data_ptr()), static_cast<uint32_t>(threshold)};
  }
};

int size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// Sizes and offsets within a row are 32-bit in the kernels, offsets of rows are not.
int small(int64_t size, const char* what) {
  STD_TORCH_CHECK(size > 0 && size < INT32_MAX - 1024, what, " is ", size, ", expected 1 to ", INT32_MAX - 1025);
  return static_cast<int>(size);
}

// The stream that torch has made current, asked for at every launch: one that was kept would capture an empty graph. A
// libtorch without CUDA lacks the function, hence its name at run time.
cudaStream_t current_stream(const Tensor& t) {
  if (t.is_cpu()) return nullptr;
  using Ask = AOTITorchError (*)(int32_t, void**);
  static const Ask ask = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    return library ? reinterpret_cast<Ask>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(ask != nullptr, "this libtorch has no aoti_torch_get_current_cuda_stream");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(ask(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

void check_launch(cudaError_t error, const char* kernel) {
  STD_TORCH_CHECK(error == cudaSuccess, "launching ", kernel, " failed: ", cudaGetErrorString(error), " (",
                  static_cast<int>(error), ")");
}

double factor_of(int64_t threshold) { return 1.0 / (1.0 - static_cast<double>(threshold) / 65536.0); }

svdkern::cuda::PackedFactor packed(const Device& device, const Tensor& in, const Tensor& out, bool rows, int64_t r) {
  const View from = device.look(in, "a factor", 2, true), to = device.look(out, "a packed factor", 2);
  expect(from.size[1], r, "the rank of a factor", "the rank of the other");
  expect(to.size[rows], svdkern::cuda::padded(static_cast<int>(r)), "the ranks of a packed factor", "R");
  const int64_t least = from.size[0];
  STD_TORCH_CHECK(rows ? to.size[0] == least : to.size[1] >= least, "a packed factor has the wrong length");
  STD_TORCH_CHECK(to.stride[1] == 1 && to.stride[0] == to.size[1] && to.size[1] * size_of(to.dtype) % 16 == 0,
                  "a packed factor must be contiguous, with rows of whole 16 bytes");
  svdkern::cuda::PackedFactor f;
  f.in = from.data, f.row_stride = from.stride[0], f.rank_stride = from.stride[1];
  f.length = small(least, "the length of a factor"), f.dtype = from.dtype, f.rows = rows;
  f.out = const_cast<void*>(to.data), f.out_stride = to.stride[0];
  return f;
}

void cuda_pack(const Tensor& first, const Tensor& first_out, bool first_rows, const MaybeTensor& second,
               const MaybeTensor& second_out, bool second_rows, const MaybeTensor& control) {
  const Device device{first};
  svdkern::cuda::PackParams p;
  p.r = small(device.look(first, "a factor", 2, true).size[1], "r");
  p.dtype = device.look(first_out, "a packed factor", 2).dtype;
  p.factors[0] = packed(device, first, first_out, first_rows, p.r);
  STD_TORCH_CHECK(second.has_value() == second_out.has_value(), "second and second_out come together");
  if (second.has_value()) {
    expect_type(device.look(*second_out, "a packed factor", 2).dtype, p.dtype, "a packed factor", "the other");
    p.factors[1] = packed(device, *second, *second_out, second_rows, p.r);
  }
  if (control.has_value()) {
    p.control = device.counters(control, "control", 1);
    p.counters = small(control->numel(), "the size of control");
  }
  check_launch(pack_launch(p, current_stream(first)), "pack");
}

svdkern::cuda::ShrinkParams shrink_params(const Device& device, const Tensor& a, const Tensor& factor, int64_t r,
                                          const MaybeTensor& sigma, const MaybeTensor& core, const MaybeTensor& gate,
                                          bool gate_first, const MaybeTensor& scale, double scale_value,
                                          const MaybeTensor& rng_state, int64_t threshold, const MaybeTensor& h,
                                          const MaybeTensor& z) {
  const View left = device.look(a, "a", 2), right = device.look(factor, "factor", 2);
  svdkern::cuda::ShrinkParams p;
  p.rows = small(left.size[0], "the number of rows of a"), p.width = small(left.size[1], "the width of a");
  p.r = small(r, "r"), p.dtype = left.dtype;
  const int R = svdkern::cuda::padded(p.r);
  STD_TORCH_CHECK(left.stride[1] == 1 || p.width == 1, "the rows of a must be contiguous");
  expect_type(right.dtype, p.dtype, "factor", "a");
  expect(right.size[0], R, "the number of rows of factor", "r, padded");
  STD_TORCH_CHECK(right.size[1] >= p.width && right.stride[1] == 1 && right.stride[0] >= right.size[1],
                  "factor is not as pack makes it");
  p.a = left.data, p.a_stride = left.stride[0], p.factor = right.data, p.factor_stride = right.stride[0];
  p.keep = device.keep(rng_state, threshold), p.keep_scale = static_cast<float>(factor_of(threshold));
  p.by = device.epilogue(sigma, core, gate, gate_first, scale, scale_value, left.size[0], r);
  p.h = static_cast<float*>(device.dense(h, "h", {left.size[0], r}, DType::f32));
  p.z = device.dense(z, "z", {left.size[0], R}, p.dtype);
  return p;
}

void cuda_shrink(const Tensor& a, const Tensor& factor, int64_t r, const MaybeTensor& sigma, const MaybeTensor& core,
                 const MaybeTensor& gate, bool gate_first, const MaybeTensor& scale, double scale_value,
                 const MaybeTensor& rng_state, int64_t threshold, const MaybeTensor& h, const MaybeTensor& z,
                 const MaybeTensor& partial, const MaybeTensor& counters) {
  const Device device{a};
  auto p = shrink_params(device, a, factor, r, sigma, core, gate, gate_first, scale, scale_value, rng_state, threshold,
                         h, z);
  p.splits = device.splits(partial, counters, p.rows, p.r);
  check_launch(shrink_launch(p, current_stream(a)), "shrink");
}

void cuda_outer(const Tensor& a, const Tensor& q, int64_t r, const MaybeTensor& rng_state, int64_t threshold,
                const Tensor& out, const MaybeTensor& partial, const MaybeTensor& counters) {
  const Device device{a};
  const View left = device.look(a, "a", 2), to = device.look(out, "out", 2, true);
  svdkern::cuda::OuterParams p;
  p.rows = small(left.size[0], "the number of rows of a"), p.width = small(left.size[1], "the width of a");
  p.r = small(r, "r"), p.dtype = left.dtype;
  const int R = svdkern::cuda::padded(p.r);
  STD_TORCH_CHECK(left.stride[1] == 1 || p.width == 1, "the rows of a must be contiguous");
  p.a = left.data, p.a_stride = left.stride[0];
  p.q = device.dense(q, "q", {left.size[0], R}, p.dtype);
  p.keep = device.keep(rng_state, threshold), p.keep_scale = static_cast<float>(factor_of(threshold));
  expect(to.size[0], p.width, "the number of rows of out", "the width of a");
  expect(to.size[1], r, "the number of columns of out", "r");
  p.out = {const_cast<void*>(to.data), to.size[0], to.size[1], to.stride[0], to.stride[1], to.dtype};
  p.splits = device.splits(partial, counters, p.width, p.r);
  check_launch(outer_launch(p, current_stream(a)), "outer");
}

// w, (depth, columns), one of its strides 1.
template <class P>
void take_weight(P& p, const Device& device, const Tensor& w) {
  const View v = device.look(w, "w", 2);
  expect(v.size[0], p.depth, "the number of rows of w", "the width of a");
  expect(v.size[1], p.columns, "the number of columns of w", "the width of out");
  expect_type(v.dtype, p.dtype, "w", "a");
  const bool down = v.stride[0] == 1 || p.depth == 1, along = v.stride[1] == 1 || p.columns == 1;
  STD_TORCH_CHECK(down || along, "one of w's strides must be 1");
  p.w = v.data, p.w_trans = !down, p.w_stride = v.stride[down];
}

svdkern::cuda::LinearParams linear_params(const Device& device, const Tensor& a, const MaybeTensor& w,
                                          const MaybeTensor& z, const MaybeTensor& factor, int64_t r,
                                          const MaybeTensor& bias, const MaybeTensor& rng_state, int64_t threshold,
                                          const Tensor& out) {
  const View left = device.look(a, "a", 2), to = device.look(out, "out", 2);
  svdkern::cuda::LinearParams p;
  p.rows = small(left.size[0], "the number of rows of a"), p.depth = small(left.size[1], "the width of a");
  p.columns = small(to.size[1], "the width of out"), p.dtype = left.dtype;
  STD_TORCH_CHECK(left.stride[1] == 1 || p.depth == 1, "the rows of a must be contiguous");
  p.a = left.data, p.a_stride = left.stride[0];
  if (w.has_value()) take_weight(p, device, *w);
  STD_TORCH_CHECK(z.has_value() == factor.has_value(), "z and factor come together");
  if (z.has_value()) {
    p.r = small(r, "r");
    const int R = svdkern::cuda::padded(p.r);
    p.z = device.dense(z, "z", {left.size[0], R}, p.dtype);
    p.factor = device.dense(factor, "factor", {to.size[1], R}, p.dtype);
  }
  p.bias = device.dense(bias, "bias", {to.size[1]}, p.dtype);
  p.keep = device.keep(rng_state, threshold), p.keep_scale = static_cast<float>(factor_of(threshold));
  expect(to.size[0], p.rows, "the number of rows of out", "the rows of a");
  expect_type(to.dtype, p.dtype, "out", "a");
  STD_TORCH_CHECK(to.stride[1] == 1 || p.columns == 1, "the rows of out must be contiguous");
  p.out = const_cast<void*>(to.data), p.out_stride = to.stride[0];
  return p;
}

void cuda_linear(const Tensor& a, const MaybeTensor& w, const MaybeTensor& z, const MaybeTensor& factor, int64_t r,
                 const MaybeTensor& bias, const MaybeTensor& rng_state, int64_t threshold, const Tensor& out) {
  const Device device{a};
  const auto p = linear_params(device, a, w, z, factor, r, bias, rng_state, threshold, out);
  check_launch(linear_launch(p, current_stream(a)), "linear");
}

int few(int64_t rows) {
  STD_TORCH_CHECK(rows > 0 && rows <= svdkern::cuda::small_rows, "a has ", rows, " rows, expected 1 to ",
                  svdkern::cuda::small_rows);
  return static_cast<int>(rows);
}

void cuda_small_shrink(const Tensor& a, const Tensor& factor, const MaybeTensor& rng_state, int64_t threshold,
                       const Tensor& sums, const MaybeTensor& control) {
  const Device device{a};
  const View left = device.look(a, "a", 2), right = device.look(factor, "factor", 2, true);
  svdkern::cuda::SmallShrinkParams p;
  p.rows = few(left.size[0]), p.width = small(left.size[1], "the width of a"), p.dtype = left.dtype;
  STD_TORCH_CHECK(left.stride[1] == 1 || p.width == 1, "the rows of a must be contiguous");
  expect(right.size[0], p.width, "the number of rows of factor", "the width of a");
  small(right.size[1], "r");
  p.a = left.data, p.a_stride = left.stride[0], p.factor = as_matrix(right);
  p.keep = device.keep(rng_state, threshold), p.keep_scale = static_cast<float>(factor_of(threshold));
  p.slices = small(sums.size(0), "the number of slices");
  p.sums = static_cast<float*>(device.dense(sums, "sums", {p.slices, p.rows, right.size[1]}, DType::f32));
  if (control.has_value()) {
    p.control = device.counters(control, "control", 1);
    p.counters = small(control->numel(), "the size of control");
  }
  check_launch(small_shrink_launch(p, current_stream(a)), "small_shrink");
}

void cuda_small_linear(const Tensor& a, const MaybeTensor& w, const MaybeTensor& sums, const MaybeTensor& factor,
                       const MaybeTensor& sigma, const MaybeTensor& core, const MaybeTensor& gate, bool gate_first,
                       const MaybeTensor& scale, double scale_value, const MaybeTensor& bias,
                       const MaybeTensor& rng_state, int64_t threshold, const MaybeTensor& h, const MaybeTensor& z,
                       const Tensor& out, const MaybeTensor& partial, const MaybeTensor& counters) {
  const Device device{a};
  const View left = device.look(a, "a", 2), to = device.look(out, "out", 2);
  svdkern::cuda::SmallLinearParams p;
  p.rows = few(left.size[0]), p.depth = small(left.size[1], "the width of a");
  p.columns = small(to.size[1], "the width of out"), p.dtype = left.dtype;
  STD_TORCH_CHECK(left.stride[1] == 1 || p.depth == 1, "the rows of a must be contiguous");
  p.a = left.data, p.a_stride = left.stride[0];
  if (w.has_value()) take_weight(p, device, *w);
  STD_TORCH_CHECK(sums.has_value() == factor.has_value(), "sums and factor come together");
  if (sums.has_value()) {
    const View f = device.look(*factor, "factor", 2, true);
    expect(f.size[0], p.columns, "the number of rows of factor", "the width of out");
    p.factor = as_matrix(f), p.r = small(f.size[1], "r"), p.slices = small(sums->size(0), "the number of slices");
    p.sums = static_cast<const float*>(device.dense(sums, "sums", {p.slices, p.rows, p.r}, DType::f32));
    p.by = device.epilogue(sigma, core, gate, gate_first, scale, scale_value, p.rows, p.r);
    p.h = static_cast<float*>(device.dense(h, "h", {p.rows, p.r}, DType::f32));
    p.z = device.dense(z, "z", {p.rows, svdkern::cuda::padded(p.r)}, p.dtype);
  }
  p.bias = device.dense(bias, "bias", {to.size[1]}, p.dtype);
  p.keep = device.keep(rng_state, threshold), p.keep_scale = static_cast<float>(factor_of(threshold));
  expect(to.size[0], p.rows, "the number of rows of out", "the rows of a");
  expect_type(to.dtype, p.dtype, "out", "a");
  STD_TORCH_CHECK(to.stride[1] == 1 || p.columns == 1, "the rows of out must be contiguous");
  p.out = const_cast<void*>(to.data), p.out_stride = to.stride[0];
  if (partial.has_value()) {
    p.splits.splits = small(partial->size(0), "the number of splits");
    p.splits.partial =
        static_cast<float*>(device.dense(partial, "partial", {p.splits.splits, p.rows, p.columns}, DType::f32));
    p.splits.counters = device.counters(counters, "counters", ceil_div(p.columns, svdkern::cuda::small_columns));
  }
  STD_TORCH_CHECK(p.splits.splits < 65536 && p.splits.splits >= w.has_value() + sums.has_value(), "partial is for ",
                  p.splits.splits, " splits, expected one for w, one for the adapter, and less than 65536");
  check_launch(small_linear_launch(p, current_stream(a)), "small_linear");
}

// Whether it is done: else nothing is launched, and shrink and linear are what serves.
bool cuda_forward(const Tensor& x, const Tensor& columns, int64_t r, const MaybeTensor& sigma, const MaybeTensor& core,
                  const MaybeTensor& gate, const MaybeTensor& scale, double scale_value, const MaybeTensor& rng_state,
                  int64_t threshold, const Tensor& w, const Tensor& rows, const MaybeTensor& bias, const Tensor& h,
                  const Tensor& z, const Tensor& control, const Tensor& y) {
  const Device device{x};
  svdkern::cuda::ForwardParams p;
  p.shrink =
      shrink_params(device, x, columns, r, sigma, core, gate, false, scale, scale_value, rng_state, threshold, h, z);
  p.linear = linear_params(device, x, w, z, rows, r, bias, rng_state, 0, y);
  if (!forward_serves(p.linear)) return false;
  p.control = device.counters(control, "control", 1 + ceil_div(p.linear.rows, svdkern::cuda::forward_rows));
  check_launch(forward_launch(p, current_stream(x)), "forward");
  return true;
}

std::string cuda_probe(const Tensor& on) {
  (void)on;
  const cudaError_t error = svdkern::cuda::probe();
  return error == cudaSuccess ? "" : std::string(cudaGetErrorString(error)) + " (" + std::to_string(error) + ")";
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(svdkern, SVDKERN_CUDA_KEY, m) {
  m.impl("_cuda_pack", TORCH_BOX(&cuda_pack));
  m.impl("_cuda_shrink", TORCH_BOX(&cuda_shrink));
  m.impl("_cuda_outer", TORCH_BOX(&cuda_outer));
  m.impl("_cuda_linear", TORCH_BOX(&cuda_linear));
  m.impl("_cuda_small_shrink", TORCH_BOX(&cuda_small_shrink));
  m.impl("_cuda_small_linear", TORCH_BOX(&cuda_small_linear));
  m.impl("_cuda_forward", TORCH_BOX(&cuda_forward));
  m.impl("_cuda_probe", TORCH_BOX(&cuda_probe));
}
