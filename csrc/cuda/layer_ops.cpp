// A whole layer as one operator, forward and backward: checks once, then the launches of layer.h. Results and the
// workspace are arguments; how large that must be, `_cuda_workspace` says.
#include "layer.h"
#include "operands.h"

namespace {

using svdkern::cuda::LayerBackward;
using svdkern::cuda::LayerForward;
using svdkern::cuda::Workspace;

enum Want { want_x = 1, want_u = 2, want_sigma = 4, want_v = 8, want_p = 16, outside = 32 };

void set_wants(LayerBackward& l, int64_t mask) {
  l.want_x = mask & want_x, l.want_u = mask & want_u, l.want_sigma = mask & want_sigma;
  l.want_v = mask & want_v, l.want_p = mask & want_p, l.outside = mask & outside;
}

// Bytes of the workspace of a layer (rows, width) -> (rows, columns): forward, or backward (the gradients of `mask`);
// in both `mask` says whether the product with w is outside.
int64_t cuda_workspace(const Tensor& x, int64_t rows, int64_t width, int64_t columns, int64_t r, bool base,
                       bool backward, int64_t mask) {
  const DType dtype = look_anywhere(x, "x", x.dim()).dtype;
  const int processors = svdkern::cuda::device_limits().processors;
  const int m = small(rows, "the number of rows"), k = small(width, "the width of x"),
            n = small(columns, "the width of y");
  Workspace room(nullptr);
  const auto fill = [&](auto& l, int depth, int out) {
    l.shrink.rows = l.linear.rows = m, l.shrink.width = l.linear.depth = depth, l.linear.columns = out;
    l.shrink.r = l.linear.r = small(r, "r"), l.shrink.dtype = l.linear.dtype = dtype, l.base = base;
    l.u.rows = k, l.v.rows = n;
  };
  if (backward) {
    LayerBackward l;
    fill(l, n, k), set_wants(l, mask), l.of_u.width = k, l.of_v.width = n;
    run_layer(l, room, processors, nullptr);
  } else {
    LayerForward l;
    fill(l, k, n), l.outside = mask & outside;
    run_layer(l, room, processors, nullptr);
  }
  return room.bytes();
}

Workspace workspace_of(const Device& device, const Tensor& t) {
  STD_TORCH_CHECK(
      t.scalar_type() == ScalarType::Byte && t.is_contiguous() && t.numel() > 0 && t.is_cpu() == device.first.is_cpu(),
      "workspace must be a contiguous uint8 tensor on the device of the others");
  return Workspace(t.mutable_data_ptr());
}

// The pieces lay in the workspace as far as this one counts.
void check_workspace(const Workspace& room, const Tensor& t) {
  STD_TORCH_CHECK(room.bytes() <= t.numel(), "workspace has ", t.numel(), " bytes, expected ", room.bytes());
}

svdkern::Matrix factor_view(const Device& device, const Tensor& t, const char* name, int64_t rows, int64_t r) {
  const View v = device.look(t, name, 2, true);
  expect(v.size[0], rows, name, "the width that it belongs to");
  expect(v.size[1], r, "the rank of a factor", "the rank of the other");
  return as_matrix(v);
}

// a (rows, width) row-major as the first operand of both products.
template <class Layer>
void take_rows(Layer& l, const Device& device, const Tensor& a, const char* name, int64_t r) {
  const View v = device.look(a, name, 2);
  l.shrink.rows = l.linear.rows = small(v.size[0], "the number of rows");
  l.shrink.width = l.linear.depth = small(v.size[1], "the width of an operand");
  STD_TORCH_CHECK(v.stride[1] == 1 || v.size[1] == 1, "the rows of ", name, " must be contiguous");
  l.shrink.a = l.linear.a = v.data, l.shrink.a_stride = l.linear.a_stride = v.stride[0];
  l.shrink.dtype = l.linear.dtype = v.dtype, l.shrink.r = l.linear.r = small(r, "r");
}

void take_result(svdkern::cuda::LinearParams& l, const Device& device, const Tensor& out, const char* name) {
  const View v = device.look(out, name, 2);
  expect(v.size[0], l.rows, name, "the number of rows");
  expect_type(v.dtype, l.dtype, name, "x");
  l.columns = small(v.size[1], "the width of a result");
  STD_TORCH_CHECK(v.stride[1] == 1 || l.columns == 1, "the rows of ", name, " must be contiguous");
  l.out = const_cast<void*>(v.data), l.out_stride = v.stride[0];
}

// Where the caller's own product with w finds its other operands.
template <class Layer>
void take_outside(Layer& l, const Device& device, const MaybeTensor& z, const MaybeTensor& factor, int64_t length,
                  bool without_result) {
  STD_TORCH_CHECK(z.has_value() == factor.has_value(), "z (or q) and factor come together");
  STD_TORCH_CHECK(!z.has_value() || without_result, "either a result, or z (or q) and factor for it");
  l.outside = z.has_value();
  if (!l.outside) return;
  const int R = svdkern::cuda::padded(l.shrink.r);
  l.shrink.z = device.dense(z, "z", {l.shrink.rows, R}, l.shrink.dtype);
  l.factor = device.dense(factor, "factor", {length, R}, l.shrink.dtype);
}

void cuda_layer_forward(const Tensor& x, const MaybeTensor& w, const Tensor& u, const MaybeTensor& sigma,
                        const Tensor& v, const MaybeTensor& bias, const MaybeTensor& scale, double scale_value,
                        const MaybeTensor& core, const MaybeTensor& gate, const MaybeTensor& rng_state,
                        int64_t threshold, const MaybeTensor& y, const Tensor& h, const MaybeTensor& z,
                        const MaybeTensor& factor, const Tensor& workspace) {
  const Device device{x};
  LayerForward l;
  const int64_t r = u.size(1);
  take_rows(l, device, x, "x", r);
  if (y.has_value())
    take_result(l.linear, device, *y, "y");
  else
    l.linear.columns = small(v.size(0), "the width of y");
  take_outside(l, device, z, factor, l.linear.columns, !y.has_value());
  l.u = factor_view(device, u, "u", l.shrink.width, r), l.v = factor_view(device, v, "v", l.linear.columns, r);
  l.base = w.has_value();
  if (l.base) take_weight(l.linear, device, *w);
  l.linear.bias = device.dense(bias, "bias", {l.linear.columns}, l.linear.dtype);
  l.shrink.keep = device.keep(rng_state, threshold), l.shrink.keep_scale = static_cast<float>(factor_of(threshold));
  l.shrink.by = device.epilogue(sigma, core, gate, false, scale, scale_value, l.shrink.rows, r);
  l.shrink.h = static_cast<float*>(device.dense(h, "h", {l.shrink.rows, r}, DType::f32));
  const int processors = svdkern::cuda::device_limits().processors;
  Workspace sizes(nullptr), room = workspace_of(device, workspace);
  run_layer(l, sizes, processors, nullptr);
  check_workspace(sizes, workspace);
  check_launch(run_layer(l, room, processors, current_stream(x)), "a layer's forward");
}

void cuda_layer_backward(const Tensor& dy, const MaybeTensor& x, const MaybeTensor& w, const Tensor& u,
                         const MaybeTensor& sigma, const Tensor& v, const MaybeTensor& scale, double scale_value,
                         const MaybeTensor& core, const MaybeTensor& gate, const MaybeTensor& h,
                         const MaybeTensor& rng_state, int64_t threshold, const MaybeTensor& dx, const MaybeTensor& du,
                         const MaybeTensor& dsigma, const MaybeTensor& dv, const MaybeTensor& p, const MaybeTensor& q,
                         const MaybeTensor& factor, const Tensor& workspace) {
  const Device device{dy};
  LayerBackward l;
  const int64_t r = u.size(1);
  take_rows(l, device, dy, "dy", r);
  const int rows = l.shrink.rows;
  l.u = factor_view(device, u, "u", u.size(0), r), l.v = factor_view(device, v, "v", l.shrink.width, r);
  set_wants(l, dx.has_value() * want_x | du.has_value() * want_u | dsigma.has_value() * want_sigma |
                   dv.has_value() * want_v | p.has_value() * want_p);
  take_outside(l, device, q, factor, u.size(0), !dx.has_value());
  const auto keep = device.keep(rng_state, threshold);
  const auto keep_scale = static_cast<float>(factor_of(threshold));
  MaybeTensor turned;
  if (core.has_value()) turned = torch::stable::transpose(*core, 0, 1);
  l.shrink.by = device.epilogue(sigma, turned, gate, true, scale, scale_value, rows, r);
  l.shrink.h = static_cast<float*>(device.dense(p, "p", {rows, r}, DType::f32));
  l.base = w.has_value();
  if (l.want_x) {
    take_result(l.linear, device, *dx, "dx");
    expect(l.linear.columns, l.u.rows, "the width of dx", "the rows of u");
    if (l.base) take_weight(l.linear, device, *w);
    l.linear.keep = keep, l.linear.keep_scale = keep_scale;
  }
  const auto outer = [&](svdkern::cuda::OuterParams& o, const Tensor& a, const Tensor& out, const char* name,
                         int64_t width) {
    const View from = device.look(a, "x", 2), to = device.look(out, name, 2, true);
    expect(from.size[0], rows, "the number of rows of x", "dy's");
    expect(from.size[1], width, "the width of an operand", "the rows of its factor");
    expect(to.size[0], width, name, "its factor");
    expect(to.size[1], r, name, "the rank of its factor");
    expect_type(from.dtype, l.shrink.dtype, "x", "dy");
    STD_TORCH_CHECK(from.stride[1] == 1 || width == 1, "the rows of x must be contiguous");
    o.a = from.data, o.a_stride = from.stride[0], o.rows = rows, o.width = static_cast<int>(width);
    o.r = static_cast<int>(r), o.dtype = from.dtype;
    o.out = {const_cast<void*>(to.data), width, r, to.stride[0], to.stride[1], to.dtype};
  };
  if (l.want_u) {
    STD_TORCH_CHECK(x.has_value(), "du needs x");
    outer(l.of_u, *x, *du, "du", l.u.rows);
    l.of_u.keep = keep, l.of_u.keep_scale = keep_scale;
  }
  if (l.want_v) outer(l.of_v, dy, *dv, "dv", l.shrink.width);
  if (l.want_v || l.want_sigma) {
    STD_TORCH_CHECK(h.has_value(), "dv and dsigma need h");
    l.modulate.h = static_cast<const float*>(device.dense(h, "h", {rows, r}, DType::f32));
    l.modulate.rows = rows, l.modulate.r = l.shrink.r, l.modulate.dtype = l.shrink.dtype;
    l.modulate.by = device.epilogue(sigma, core, gate, false, scale, scale_value, rows, r);
  }
  if (l.want_sigma) {
    const View s = device.look(*dsigma, "dsigma", 1, true);
    expect(s.size[0], r, "the size of dsigma", "r");
    l.modulate.dsigma = const_cast<void*>(s.data), l.modulate.dsigma_stride = s.stride[0],
    l.modulate.dsigma_dtype = s.dtype;
  }
  const int processors = svdkern::cuda::device_limits().processors;
  Workspace sizes(nullptr), room = workspace_of(device, workspace);
  run_layer(l, sizes, processors, nullptr);
  check_workspace(sizes, workspace);
  check_launch(run_layer(l, room, processors, current_stream(dy)), "a layer's backward");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(svdkern, SVDKERN_CUDA_KEY, m) {
  m.impl("_cuda_workspace", TORCH_BOX(&cuda_workspace));
  m.impl("_cuda_layer_forward", TORCH_BOX(&cuda_layer_forward));
  m.impl("_cuda_layer_backward", TORCH_BOX(&cuda_layer_backward));
}
