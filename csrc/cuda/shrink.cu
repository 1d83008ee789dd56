// h = (D*a) F and what follows from it, in one pass over a: h for the backward, z = s (h sigma | h R) g for the next
// product.
//
//   a (M, K) row-major, T        F packed (R, K)        h (M, r) float        z (M, R) T, zeros past r
//
//            K, in steps of 128 bytes                       CTA: 64 rows of a, up to 128 ranks, one split of K; four
//            warps of
//        +----+----+----+----+                              16 rows each, all ranks
//     64 | s0 | s1 | s2 | .. |  x  the same steps of F      Stages steps are in shared memory: cp.async brings step +
//     Stages - 1
//        +----+----+----+----+                              while step is multiplied
//
// The tile of sums then goes through shared memory, where a core needs whole rows. Few tiles are cut along K
// (splits.h). Dropout masks a tile in shared memory before it is multiplied; D's factor is one multiplication of the
// sum. Floor: one read of a, M K numbers; 2 M K r operations beside it. More than 128 ranks read a again, from the L2.
#include "epilogue.h"
#include "launch.h"
#include "product.h"
#include "splits.h"

namespace svdkern::cuda {
namespace {

constexpr int threads = 128;

template <class T, int Ranks>
struct Shape {
  static constexpr int stages = Ranks > 32 ? 3 : 4;
  static constexpr int a_bytes = tile_lines * row_bytes, stage_bytes = a_bytes + Ranks * row_bytes;
  static constexpr int sum_stride = Ranks + 8;  // no bank conflicts where warps write their sums
  static constexpr int shared = stages * stage_bytes;
  static_assert(tile_lines * sum_stride * sizeof(float) <= shared);
};

// acc += a f^T, 16 rows of a from a_row on, all ranks.
template <int Columns, class T>
__device__ void multiply_tiles(float (&acc)[Columns][4], const unsigned char* a, int a_row, const unsigned char* f) {
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int k = 0; k < row_chunks; k += 2) {
      Fragment left, right;
      load_a(left, a, a_row, k);
#pragma unroll
      for (int j = 0; j < Columns; j += 2) {
        load_b(right, f, 8 * j, k);
        multiply_pair<T>(acc[j], acc[j + 1], left, right);
      }
    }
  } else {
#pragma unroll 2
    for (int k = 0; k < row_chunks; ++k) multiply_f32(acc, a, a_row, f, 0, k);
  }
}

// The tile's sums of this split of K, into shared memory: (rows, Ranks), sum_stride apart.
template <class T, int Ranks>
__device__ void sum_tile(const ShrinkParams& p, int row0, int rank0, unsigned char* shared) {
  using S = Shape<T, Ranks>;
  const Source<T> a(p.a, p.a_stride, p.rows, p.width), f(p.factor, p.factor_stride, p.r, p.width);
  const Philox philox(p.keep);
  const int all = ceil_div(p.width, row_elements<T>), each = ceil_div(all, p.splits.splits);
  const int first = blockIdx.z * each, steps = min(each, all - first);
  const auto copy = [&](int step) {
    if (step < steps) {
      unsigned char* stage = shared + step % S::stages * S::stage_bytes;
      copy_tile<tile_lines, row_chunks, threads>(stage, a, row0, (first + step) * row_elements<T>);
      copy_tile<Ranks, row_chunks, threads>(stage + S::a_bytes, f, rank0, (first + step) * row_elements<T>);
    }
    ptx::cp_async_commit_group();  // an empty one counts too
  };
  float acc[Ranks / 8][4] = {};
  const int warp_row = threadIdx.x / 32 * 16;
#pragma unroll
  for (int step = 0; step < S::stages - 1; ++step) copy(step);
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait_group<S::stages - 2>();
    unsigned char* stage = shared + step % S::stages * S::stage_bytes;
    if (philox.threshold)
      mask_tile<tile_lines, row_chunks, threads, T>(stage, philox, row0, (first + step) * row_elements<T>);
    __syncthreads();             // this step has come for all, and the last one is read to its end by all
    copy(step + S::stages - 1);  // over the last one
    multiply_tiles<Ranks / 8, T>(acc, stage, warp_row, stage + S::a_bytes);
  }
  ptx::cp_async_wait_group<0>();
  __syncthreads();  // the stages are free
  store_sums(reinterpret_cast<float*>(shared), S::sum_stride, warp_row, acc, p.keep_scale);
  __syncthreads();
}

template <class T, int Ranks>
__global__ void __launch_bounds__(threads) shrink_kernel(const ShrinkParams p) {
  using S = Shape<T, Ranks>;
  extern __shared__ __align__(128) unsigned char shared[];
  const int row0 = blockIdx.x * tile_lines, rank0 = blockIdx.y * Ranks, R = padded(p.r);
  sum_tile<T, Ranks>(p, row0, rank0, shared);
  float* sums = reinterpret_cast<float*>(shared);
  const auto each = [&](auto what) {
    for (int i = threadIdx.x; i < tile_lines * Ranks; i += threads) {
      const int row = row0 + i / Ranks, rank = rank0 + i % Ranks;
      if (row < p.rows && rank < R) what(row, rank, sums + i / Ranks * S::sum_stride);
    }
  };
  const bool mine = add_splits(
      p.splits, blockIdx.z, blockIdx.x * gridDim.y + blockIdx.y, static_cast<int64_t>(p.rows) * R,
      [&](auto what) { each([&](int64_t row, int rank, float* line) { what(row * R + rank, line[rank - rank0]); }); });
  if (!mine) return;
  const float scale = load(p.by.scale);
  each([&](int64_t row, int rank, float* line) {
    if (p.h && rank < p.r) p.h[row * p.r + rank] = line[rank - rank0];
    if (p.z) {
      const float z = rank < p.r ? modulated(p.by, line - rank0, row, rank, p.r, scale) : 0.0f;
      static_cast<T*>(p.z)[row * R + rank] = rounded<T>(z);
    }
  });
}

template <class T, int Ranks>
cudaError_t launch_as(const ShrinkParams& p, cudaStream_t stream) {
  const dim3 grid(ceil_div(p.rows, tile_lines), ceil_div(p.r, Ranks), p.splits.splits);
  return launch(shrink_kernel<T, Ranks>, grid, threads, Shape<T, Ranks>::shared, p, stream);
}

}  // namespace

cudaError_t shrink_launch(const ShrinkParams& p, cudaStream_t stream) {
  return by_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    if (p.r <= 16) return launch_as<T, 16>(p, stream);
    if (p.r <= 32) return launch_as<T, 32>(p, stream);
    if (p.r <= 64) return launch_as<T, 64>(p, stream);
    return launch_as<T, tile_ranks>(p, stream);
  });
}

}  // namespace svdkern::cuda
