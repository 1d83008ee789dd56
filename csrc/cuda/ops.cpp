// The operators of the CUDA kernels on the LibTorch Stable ABI: checks and the call, on the current stream. They
// allocate nothing: results and workspace are arguments, which the schemas mark as written. Tensors are of sizes other
// than zero.
#include <string>

#include "operands.h"

namespace {

svdkern::cuda::PackedFactor packed(const Device& device, const Tensor& in, const Tensor& out, bool rows, int64_t r) {
  const View from = device.look(in, "a factor", 2, true), to = device.look(out, "a packed factor", 2);
  expect(from.size[1], r, "the rank of a factor", "the rank of the other");
  expect(to.size[rows], svdkern::cuda::padded(static_cast<int>(r)), "the ranks of a packed factor", "R");
  const int64_t least = from.size[0];
  STD_TORCH_CHECK(rows ? to.size[0] == least : to.size[1] >= least, "a packed factor has the wrong length");
  STD_TORCH_CHECK(
      to.stride[1] == 1 && to.stride[0] == to.size[1] && to.size[1] * svdkern::cuda::size_of(to.dtype) % 16 == 0,
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
  STD_TORCH_CHECK(p.splits.splits < 65536, "partial is for ", p.splits.splits, " splits, expected less than 65536");
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
