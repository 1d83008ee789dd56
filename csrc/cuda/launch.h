// A kernel of one by-value argument, launched.
#pragma once

#include <type_traits>

#include "params.h"

namespace svdkern::cuda {

template <class Params>
inline cudaError_t launch(void (*kernel)(Params), dim3 grid, int threads, int shared, const Params& params,
                          cudaStream_t stream) {
  constexpr int few = 1 << 10;      // what a kernel declares itself counts too
  if (shared > (48 << 10) - few) {  // more than any kernel may have unasked
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (error != cudaSuccess) return error;
  }
  void* arguments[] = {const_cast<Params*>(&params)};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, dim3(threads), arguments, shared, stream);
}

// Calls what(an integral constant) for the bucket of ranks that a tile has.
template <class What>
inline cudaError_t by_ranks(int r, What what) {
  if (r <= 16) return what(std::integral_constant<int, 16>());
  if (r <= 32) return what(std::integral_constant<int, 32>());
  if (r <= 64) return what(std::integral_constant<int, 64>());
  return what(std::integral_constant<int, tile_ranks>());
}

// Of the current device.
inline DeviceLimits device_limits() {
  int device = 0;
  DeviceLimits limits{1, 0};
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&limits.processors, cudaDevAttrMultiProcessorCount, device);
  cudaDeviceGetAttribute(&limits.shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return limits;
}

// Whether rows of all operands of linear begin at multiples of 16 bytes.
inline bool whole_chunks(const LinearParams& p) {
  const int64_t size = p.dtype == DType::f32 ? 4 : 2;
  const auto whole = [&](const void* data, int64_t stride) {
    return (reinterpret_cast<uint64_t>(data) | static_cast<uint64_t>(stride * size)) % 16 == 0;
  };
  return whole(p.a, p.a_stride) && whole(p.w, p.w_stride) && whole(p.z, 0) && whole(p.factor, 0);
}

}  // namespace svdkern::cuda
