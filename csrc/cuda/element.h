// Elements of T: bf16, f16 and f32, and 16-byte chunks of them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "params.h"

namespace svdkern::cuda {

template <class T>
constexpr int per_chunk = 16 / sizeof(T);

template <class T>
union alignas(16) Chunk {
  uint4 bits;
  T element[per_chunk<T>];
  __device__ Chunk() : bits() {}
};

template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T first, second;
};

template <class T>
__device__ inline T rounded(float value);
template <>
__device__ inline float rounded<float>(float value) {
  return value;
}
template <>
__device__ inline __nv_bfloat16 rounded<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ inline __half rounded<__half>(float value) {
  return __float2half_rn(value);
}

// An element of a small tensor of any dtype; `dtype` is the same for all threads.
__device__ inline float load(const void* data, DType dtype, int64_t at) {
  switch (dtype) {
    case DType::bf16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[at]);
    case DType::f16:
      return __half2float(static_cast<const __half*>(data)[at]);
    case DType::f64:
      return static_cast<float>(static_cast<const double*>(data)[at]);
    default:
      return static_cast<const float*>(data)[at];
  }
}

// Calls what(data as what it is): where a loop is not to ask for the dtype at every element.
template <class What>
__device__ inline void as_elements(const void* data, DType dtype, What what) {
  switch (dtype) {
    case DType::bf16:
      return what(static_cast<const __nv_bfloat16*>(data));
    case DType::f16:
      return what(static_cast<const __half*>(data));
    case DType::f64:
      return what(static_cast<const double*>(data));
    default:
      return what(static_cast<const float*>(data));
  }
}

__device__ inline float load(const Scalar& s) { return s.data ? load(s.data, s.dtype, 0) : s.value; }

__device__ inline void store(void* data, DType dtype, int64_t at, float value) {
  switch (dtype) {
    case DType::bf16:
      static_cast<__nv_bfloat16*>(data)[at] = rounded<__nv_bfloat16>(value);
      break;
    case DType::f16:
      static_cast<__half*>(data)[at] = rounded<__half>(value);
      break;
    case DType::f64:
      static_cast<double*>(data)[at] = value;
      break;
    default:
      static_cast<float*>(data)[at] = value;
  }
}

// Calls what(T()) for the T of dtype.
template <class What>
inline cudaError_t by_dtype(DType dtype, What what) {
  switch (dtype) {
    case DType::bf16:
      return what(__nv_bfloat16());
    case DType::f16:
      return what(__half());
    case DType::f32:
      return what(float());
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace svdkern::cuda
