// Sums of h = (D*a) F for up to 32 rows, the factor as it is: the first of two launches that few rows take.
//
//   a (M, K) row-major, T        F (K, r), any strides and dtype        sums (slices, M, r) float
//
//   CTA: one slice of K, 128 at a time, and 16 ranks, all rows. A thread has one rank and 4 k in 64, F's in one read of
//
//              128 k                       shared memory, a's for every row in another. Threads of a rank then add
//        +--------------+                  theirs up, lanes by shuffles and warps in their order.
//      M |      a       |  x  F^T, 16 ranks
//        +--------------+
//
// F is neither packed nor rounded: a packing would be a launch that takes as long as this one. CTA 0 zeroes the
// counters of the launches that follow. Floor: one read of a and F, K (M + r) numbers; latency, not bandwidth, is what
// it takes: reads of a and F are all under way before the first is used, and slices are so many that most of them are
// one tile; more would be more for small_linear to add up.
#include "launch.h"
#include "philox.h"

namespace svdkern::cuda {
namespace {

constexpr int threads = 256, warps = threads / 32, depth = 128, ranks = 16;
constexpr int factor_stride = depth + 4;  // floats; no bank conflicts along ranks

template <class T, int Rows>
struct Shape {
  static constexpr int a_stride = depth + per_chunk<T>, chunks = depth / per_chunk<T>;
  static constexpr int factor_bytes = ranks * factor_stride * sizeof(float);
  static constexpr int shared = factor_bytes + Rows * a_stride * sizeof(T);
  static_assert(warps * Rows * ranks * sizeof(float) <= shared && factor_bytes % 16 == 0);
};

template <class T>
struct alignas(4 * sizeof(T)) Four {
  T element[4];
};

// 128 k of the factor's ranks, from k0 and rank0 on, as (ranks, depth): zeros outside.
__device__ void load_factor(float* tile, const Matrix& f, int k0, int rank0, int end) {
  as_elements(f.data, f.dtype, [&](const auto* data) {
    const auto* first = data + k0 * f.row_stride + rank0 * f.col_stride;
    const auto value = [&](int k, int rank) {
      const bool there = k0 + k < end && rank0 + rank < f.cols;
      return there ? static_cast<float>(first[k * f.row_stride + rank * f.col_stride]) : 0.0f;
    };
    if (f.row_stride == 1) {
      const int k = threadIdx.x % depth;
#pragma unroll
      for (int rank = threadIdx.x / depth; rank < ranks; rank += threads / depth)
        tile[rank * factor_stride + k] = value(k, rank);
    } else {
      const int rank = threadIdx.x % ranks, group = threadIdx.x / ranks;
#pragma unroll
      for (int k = 4 * group; k < depth; k += 4 * threads / ranks)
        *reinterpret_cast<float4*>(tile + rank * factor_stride + k) =
            make_float4(value(k, rank), value(k + 1, rank), value(k + 2, rank), value(k + 3, rank));
    }
  });
}

// This thread's chunks of 128 columns of a: read before the factor is, which is waited for.
template <class T, int Rows>
struct Held {
  static constexpr int chunks = Shape<T, Rows>::chunks, count = ceil_div(Rows * chunks, threads);
  Chunk<T> chunk[count];

  __device__ static int row(int i) { return (i * threads + threadIdx.x) / chunks; }
  __device__ static int column() { return threadIdx.x % chunks * per_chunk<T>; }

  __device__ Held(const SmallShrinkParams& p, int k0, int end) {
    const T* a = static_cast<const T*>(p.a) + k0 + column();
    const bool aligned = (reinterpret_cast<uint64_t>(p.a) | (p.a_stride * sizeof(T))) % 16 == 0;
    const int left = end - k0 - column();
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const T* at = a + row(i) * p.a_stride;
      if (row(i) >= p.rows) continue;
      if (aligned && left >= per_chunk<T>) {
        chunk[i].bits = *reinterpret_cast<const uint4*>(at);
      } else {
#pragma unroll
        for (int e = 0; e < per_chunk<T>; ++e)
          if (e < left) chunk[i].element[e] = at[e];
      }
    }
  }

  __device__ void store(T* tile, const Philox& philox, int k0) {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      if (row(i) >= Rows) continue;
      if (philox.threshold) philox.drop<T>(chunk[i].bits, row(i), k0 + column());
      *reinterpret_cast<uint4*>(tile + row(i) * Shape<T, Rows>::a_stride + column()) = chunk[i].bits;
    }
  }
};

template <class T, int Rows>
__global__ void __launch_bounds__(threads, 1) small_shrink_kernel(const SmallShrinkParams p) {
  using S = Shape<T, Rows>;
  extern __shared__ __align__(128) unsigned char shared[];
  float* factor = reinterpret_cast<float*>(shared);
  T* a = reinterpret_cast<T*>(shared + S::factor_bytes);
  if (blockIdx.x == 0 && blockIdx.y == 0)
    for (int i = threadIdx.x; i < p.counters; i += threads) p.control[i] = 0;
  const Philox philox(p.keep);
  const int rank0 = blockIdx.y * ranks, rank = threadIdx.x % ranks, group = threadIdx.x / ranks;
  const int each = ceil_div(ceil_div(p.width, p.slices), depth) * depth, begin = blockIdx.x * each;
  const int end = min(begin + each, p.width);
  float acc[Rows] = {};
  for (int k0 = begin; k0 < end; k0 += depth) {
    Held<T, Rows> held(p, k0, end);
    load_factor(factor, p.factor, k0, rank0, end);
    held.store(a, philox, k0);
    __syncthreads();
#pragma unroll
    for (int k = 4 * group; k < depth; k += 4 * threads / ranks) {
      const float4 f = *reinterpret_cast<const float4*>(factor + rank * factor_stride + k);
#pragma unroll
      for (int row = 0; row < Rows; ++row) {
        const Four<T> x = *reinterpret_cast<const Four<T>*>(a + row * S::a_stride + k);
        acc[row] = fmaf(static_cast<float>(x.element[0]), f.x, acc[row]);
        acc[row] = fmaf(static_cast<float>(x.element[1]), f.y, acc[row]);
        acc[row] = fmaf(static_cast<float>(x.element[2]), f.z, acc[row]);
        acc[row] = fmaf(static_cast<float>(x.element[3]), f.w, acc[row]);
      }
    }
    __syncthreads();  // the tiles are read to their end
  }
  float* part = factor;  // (warps, Rows, ranks)
#pragma unroll
  for (int row = 0; row < Rows; ++row) {
    const float sum = acc[row] + __shfl_xor_sync(~0u, acc[row], ranks);
    if (threadIdx.x % 32 < ranks) part[(threadIdx.x / 32 * Rows + row) * ranks + rank] = sum;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < p.rows * ranks; i += threads) {
    if (rank0 + rank >= p.factor.cols) break;
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < warps; ++warp) sum += part[warp * Rows * ranks + i];
    const int64_t line = static_cast<int64_t>(blockIdx.x) * p.rows + i / ranks;
    p.sums[line * p.factor.cols + rank0 + rank] = sum * p.keep_scale;
  }
}

template <class T, int Rows>
cudaError_t launch_as(const SmallShrinkParams& p, cudaStream_t stream) {
  const dim3 grid(p.slices, ceil_div(static_cast<int>(p.factor.cols), ranks));
  return launch(small_shrink_kernel<T, Rows>, grid, threads, Shape<T, Rows>::shared, p, stream);
}

}  // namespace

cudaError_t small_shrink_launch(const SmallShrinkParams& p, cudaStream_t stream) {
  return by_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    if (p.rows <= 8) return launch_as<T, 8>(p, stream);
    if (p.rows <= 16) return launch_as<T, 16>(p, stream);
    return launch_as<T, small_rows>(p, stream);
  });
}

}  // namespace svdkern::cuda
