// Tensors as the parameters of the CUDA launchers (params.h): checks, the current stream, errors of a launch.
//
// SVDKERN_CUDA_KEY is the dispatch key that the operators serve. The tests build them for CPU tensors, with a CUDA
// runtime that hands every launch to the PTX emulator: what they test is this code, the launchers' and the kernels'.
#pragma once

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

// Sizes and offsets within a row are 32-bit in the kernels, offsets of rows are not.
inline int small(int64_t size, const char* what) {
  STD_TORCH_CHECK(size > 0 && size < INT32_MAX - 1024, what, " is ", size, ", expected 1 to ", INT32_MAX - 1025);
  return static_cast<int>(size);
}

// The stream that torch has made current, asked for at every launch: one that was kept would capture an empty graph. A
// libtorch without CUDA lacks the function, hence its name at run time.
inline cudaStream_t current_stream(const Tensor& t) {
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

inline void check_launch(cudaError_t error, const char* kernel) {
  STD_TORCH_CHECK(error == cudaSuccess, "launching ", kernel, " failed: ", cudaGetErrorString(error), " (",
                  static_cast<int>(error), ")");
}

inline double factor_of(int64_t threshold) { return 1.0 / (1.0 - static_cast<double>(threshold) / 65536.0); }

// w, (depth, columns), one of its strides 1.
template <class P>
inline void take_weight(P& p, const Device& device, const Tensor& w) {
  const View v = device.look(w, "w", 2);
  expect(v.size[0], p.depth, "the number of rows of w", "the width of a");
  expect(v.size[1], p.columns, "the number of columns of w", "the width of out");
  expect_type(v.dtype, p.dtype, "w", "a");
  const bool down = v.stride[0] == 1 || p.depth == 1, along = v.stride[1] == 1 || p.columns == 1;
  STD_TORCH_CHECK(down || along, "one of w's strides must be 1");
  p.w = v.data, p.w_trans = !down, p.w_stride = v.stride[down];
}

}  // namespace
