// What nvcc makes of C++: a struct by value, static and dynamic shared memory, constants, a local array, generic
// addresses.
#include <cuda_runtime_api.h>

namespace forms {
namespace {

struct Params {
  const int* in;
  int* out;
  short narrow;
  double wide;
  int at[4];
};

__constant__ int table[4] = {3, -1, 4, 1};

template <int Threads>
__global__ void forms_kernel(const Params p) {
  extern __shared__ int dynamic[];
  __shared__ int fixed[Threads];
  const int i = threadIdx.x;
  fixed[i] = p.in[i];
  dynamic[i] = 10 * p.in[i];
  int local[8];
#pragma unroll 1
  for (int k = 0; k < 8; ++k) local[k] = k * i;
  __syncthreads();
  const int* anywhere = p.at[i % 4] == 0 ? fixed : p.at[i % 4] == 1 ? dynamic : p.at[i % 4] == 2 ? p.in : local;
  p.out[i] = anywhere[(i ^ 1) % 8] + table[i % 4] * 1000 + local[p.in[i] & 7] + p.narrow + static_cast<int>(p.wide);
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int launch_forms(const int* in, int* out, int blocks, int shared,
                                                                   bool granted) {
  const Params p{in, out, -7, 2.5, {0, 1, 2, 3}};
  if (granted) cudaFuncSetAttribute((const void*)forms_kernel<64>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  void* arguments[] = {const_cast<Params*>(&p)};
  return cudaLaunchKernel((const void*)forms_kernel<64>, dim3(blocks), dim3(64), arguments, shared, nullptr);
}

}  // namespace forms
