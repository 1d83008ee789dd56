// What the backward makes of h and p, row by row and summed over the rows:
//
//   z = s (h sigma | h R) g   in T, for dV         dsigma = sum over rows of h t    with t = s p g
//
//   h, p (M, r) float         CTA: one split of the rows; 16 ranks at a time, a thread has one rank of every 16th row
//
// The threads' sums meet in shared memory, splits' in splits.h, both in a fixed order. It also zeroes the counters of
// the launches that follow where it is the first of them. Floor: one read of h and p; at r = 16 that is a launch.
#include "epilogue.h"
#include "launch.h"
#include "splits.h"

namespace svdkern::cuda {
namespace {

constexpr int threads = 256, ranks = 16, groups = threads / ranks;

template <class T>
__device__ void store_z(const ModulateParams& p, int first, int last) {
  const int R = padded(p.r);
  const float scale = load(p.by.scale);
  for (int64_t i = static_cast<int64_t>(first) * R + threadIdx.x; i < static_cast<int64_t>(last) * R; i += threads) {
    const int64_t row = i / R;
    const int rank = static_cast<int>(i - row * R);
    const float value = rank < p.r ? modulated(p.by, p.h + row * p.r, row, rank, p.r, scale) : 0.0f;
    static_cast<T*>(p.z)[i] = rounded<T>(value);
  }
}

// sums[rank] of the split's rows, 16 ranks from rank0 on.
__device__ void sum_rows(const ModulateParams& p, float* sums, int rank0, int first, int last) {
  const int rank = rank0 + threadIdx.x % ranks, group = threadIdx.x / ranks;
  float sum = 0.0f;
  if (rank < p.r)
#pragma unroll 4
    for (int64_t row = first + group; row < last; row += groups) {
      const int64_t at = row * p.r + rank;
      sum = fmaf(p.h[at], p.by.gate ? p.p[at] * p.by.gate[at] : p.p[at], sum);
    }
  __syncthreads();  // the sums before are read to their end
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (group == 0) {
#pragma unroll
    for (int g = 1; g < groups; ++g) sum += sums[g * ranks + threadIdx.x];
    sums[threadIdx.x] = sum * load(p.by.scale);
  }
}

template <class T>
__global__ void __launch_bounds__(threads) modulate_kernel(const ModulateParams p) {
  __shared__ float sums[threads];
  if (blockIdx.x == 0)
    for (int i = threadIdx.x; i < p.counters; i += threads) p.control[i] = 0;
  const int each = ceil_div(p.rows, p.splits.splits), first = blockIdx.x * each, last = min(first + each, p.rows);
  if (p.z) store_z<T>(p, first, last);
  if (!p.dsigma) return;
  for (int rank0 = 0; rank0 < p.r; rank0 += ranks) {
    sum_rows(p, sums, rank0, first, last);
    const int rank = rank0 + threadIdx.x;
    const bool has = threadIdx.x < ranks && rank < p.r;
    const bool mine = add_splits(p.splits, blockIdx.x, rank0 / ranks, p.r, [&](auto what) {
      if (has) what(rank, sums[threadIdx.x]);
    });
    if (mine && has) store(p.dsigma, p.dsigma_dtype, rank * p.dsigma_stride, sums[threadIdx.x]);
  }
}

}  // namespace

cudaError_t modulate_launch(const ModulateParams& p, cudaStream_t stream) {
  return by_dtype(p.dtype, [&](auto t) {
    return launch(modulate_kernel<decltype(t)>, dim3(p.splits.splits), threads, 0, p, stream);
  });
}

}  // namespace svdkern::cuda
