// A kernel of one by-value argument, launched.
#pragma once

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

}  // namespace svdkern::cuda
