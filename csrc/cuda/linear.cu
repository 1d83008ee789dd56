// out = a w + D*(z F^T) + bias, rounded once: the frozen product, and the adapter as more steps of the same loop.
//
//   a (M, K) row-major, T     w (N, K) row-major, or (K, N) contracted down its rows     z (M, R) T     F packed (N, R)
//
//          K, in steps of 128 bytes          R
//        +----+----+----+----+----+    +----+      CTA: a tile of out, 128 x 128 or 64 x 64; warps of 64 x 32 or 32 x
//        32 each
//     BM | s0 | s1 | s2 | .. |    |    | z  |      of it. Three steps are in shared memory: cp.async brings step + 2
//     while step
//        +----+----+----+----+----+    +----+      is multiplied. (z, F) is one step for every 128 bytes of ranks, in
//        the same
//          x  the same steps of w        F         pipeline, into the same sums; it has as many products as R has k-16
//          slices.
//
// With dropout the adapter's steps come first, and the sums are masked between them and the first step of K. The sums
// go out through shared memory, 16 bytes a store. Floor: 2 M N (K + R) operations; a, w and out once, w from the L2 for
// every group of eight row tiles but the first.
#include "launch.h"
#include "product.h"

namespace svdkern::cuda {
namespace {

constexpr int group_height = 8, warp_columns = 32;

template <class T, int BM, int BN>
struct Shape {
  static constexpr int stages = BM == 32 ? 6 : 3;
  static constexpr int warp_rows = BM / 2, column_warps = BN / warp_columns, threads = 2 * column_warps * 32;
  static constexpr int depth = row_elements<T>, panel = row_elements<T>, panels = ceil_div(BN, panel);
  static constexpr int panel_bytes = depth * row_bytes;                          // of w contracted down its rows
  static constexpr int panel_chunks = (BN < panel ? BN : panel) / per_chunk<T>;  // of a row that are copied
  static constexpr int a_bytes = BM * row_bytes,
                       w_bytes = BN * row_bytes > panels *panel_bytes ? BN * row_bytes : panels * panel_bytes;
  static constexpr int stage_bytes = a_bytes + w_bytes, shared = stages * stage_bytes;
  static constexpr int row_blocks = warp_rows / 16, column_blocks = warp_columns / 8;
  static constexpr int out_stride = BN + per_chunk<T>;  // elements; no bank conflicts where warps write theirs
  static_assert(BM == 2 * warp_rows && column_blocks == 4);
  static_assert(BM * out_stride * sizeof(T) <= shared);
};

template <class S>
using Sums = float[S::row_blocks][S::column_blocks][4];

// acc += a b at one step, of which the first `slices` 16ths (f32: 4ths) count; b's rows are columns of out unless
// Trans.
template <class T, class S, bool Trans>
__device__ void multiply_tiles(Sums<S>& acc, const unsigned char* a, int row, const unsigned char* b, int column,
                               int slices) {
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int k = 0; k < S::depth / 16; ++k) {
      if (k >= slices) break;
      Fragment left, right[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if constexpr (Trans)
          load_b_trans(right[j], b + column / S::panel * S::panel_bytes, 16 * k, column % S::panel / 8 + 2 * j);
        else
          load_b(right[j], b, column + 16 * j, 2 * k);
      }
#pragma unroll
      for (int i = 0; i < S::row_blocks; ++i) {
        load_a(left, a, row + 16 * i, 2 * k);
        multiply_pair<T>(acc[i][0], acc[i][1], left, right[0]);
        multiply_pair<T>(acc[i][2], acc[i][3], left, right[1]);
      }
    }
  } else if constexpr (!Trans) {
#pragma unroll 1
    for (int k = 0; k < slices; ++k)
#pragma unroll
      for (int i = 0; i < S::row_blocks; ++i) multiply_f32(acc[i], a, row + 16 * i, b, column, k);
  } else {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const unsigned char* right = b + column / S::panel * S::panel_bytes;
#pragma unroll 4
    for (int k = 0; k < S::depth; ++k)
#pragma unroll
      for (int i = 0; i < S::row_blocks; ++i) {
        const float upper = element(a, row + 16 * i + g, k), lower = element(a, row + 16 * i + g + 8, k);
#pragma unroll
        for (int j = 0; j < S::column_blocks; ++j) {
          const float2 two = *reinterpret_cast<const float2*>(&element(right, k, column % S::panel + 8 * j + 2 * t));
          acc[i][j][0] = fmaf(upper, two.x, acc[i][j][0]), acc[i][j][1] = fmaf(upper, two.y, acc[i][j][1]);
          acc[i][j][2] = fmaf(lower, two.x, acc[i][j][2]), acc[i][j][3] = fmaf(lower, two.y, acc[i][j][3]);
        }
      }
  }
}

// D times the sums of the adapter.
template <class S>
__device__ void mask_sums(Sums<S>& acc, const Philox& philox, int row, int column, float keep_scale) {
  const int g = threadIdx.x % 32 / 4;
#pragma unroll
  for (int i = 0; i < S::row_blocks; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t words[4];
      philox.words_of_sums(words, row + 16 * i + 8 * half + g, column / 8);
#pragma unroll
      for (int j = 0; j < S::column_blocks; ++j) {
        float &even = acc[i][j][2 * half], &odd = acc[i][j][2 * half + 1];
        even = (words[j] & 0xffffu) >= philox.threshold ? even * keep_scale : 0.0f;
        odd = (words[j] >> 16) >= philox.threshold ? odd * keep_scale : 0.0f;
      }
    }
}

template <class T, int BM, int BN, bool Trans, class S = Shape<T, BM, BN>>
__device__ void sum_tile(Sums<S>& acc, const LinearParams& p, int row0, int column0, int warp_row, int warp_column,
                         unsigned char* shared) {
  const int R = p.z ? padded(p.r) : 0, depth = p.w ? p.depth : 0;
  const Source<T> a(p.a, p.a_stride, p.rows, depth), z(p.z, R, p.rows, R), f(p.factor, R, p.columns, R);
  const Source<T> w(p.w, p.w_stride, Trans ? depth : p.columns, Trans ? p.columns : depth);
  const Philox philox(p.keep);
  const int base = ceil_div(depth, S::depth), more = ceil_div(R, S::depth), steps = base + more;
  const int first = philox.threshold ? more : 0;  // steps of the adapter that come before those of K
  const auto copy = [&](int step) {
    if (step < steps) {
      unsigned char* stage = shared + step % S::stages * S::stage_bytes;
      const int k = (step - first) * S::depth;
      if (step >= first && step < first + base) {
        copy_tile<BM, row_chunks, S::threads>(stage, a, row0, k);
        if constexpr (Trans) {
#pragma unroll
          for (int i = 0; i < S::panels; ++i)
            copy_tile<S::depth, S::panel_chunks, S::threads>(stage + S::a_bytes + i * S::panel_bytes, w, k,
                                                             column0 + i * S::panel);
        } else {
          copy_tile<BN, row_chunks, S::threads>(stage + S::a_bytes, w, column0, k);
        }
      } else {
        const int rank = (step < first ? step : step - base) * S::depth;
        copy_tile<BM, row_chunks, S::threads>(stage, z, row0, rank);
        copy_tile<BN, row_chunks, S::threads>(stage + S::a_bytes, f, column0, rank);
      }
    }
    ptx::cp_async_commit_group();  // an empty one counts too
  };
#pragma unroll
  for (int step = 0; step < S::stages - 1; ++step) copy(step);
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait_group<S::stages - 2>();
    __syncthreads();             // this step has come for all, and the last one is read to its end by all
    copy(step + S::stages - 1);  // over the last one
    const unsigned char* stage = shared + step % S::stages * S::stage_bytes;
    constexpr int all = row_bytes / 32 * (sizeof(T) == 2 ? 1 : 2), slice = S::depth / all;
    if (step >= first && step < first + base) {
      multiply_tiles<T, S, Trans>(acc, stage, warp_row, stage + S::a_bytes, warp_column, all);
    } else {
      const int rank = (step < first ? step : step - base) * S::depth;
      multiply_tiles<T, S, false>(acc, stage, warp_row, stage + S::a_bytes, warp_column, min(all, (R - rank) / slice));
      if (step == first - 1) mask_sums<S>(acc, philox, row0 + warp_row, column0 + warp_column, p.keep_scale);
    }
  }
  ptx::cp_async_wait_group<0>();
  __syncthreads();  // the stages are free
}

template <class T, int BM, int BN, bool Trans>
__global__ void __launch_bounds__(Shape<T, BM, BN>::threads, 1) linear_kernel(const LinearParams p) {
  using S = Shape<T, BM, BN>;
  extern __shared__ __align__(128) unsigned char shared[];
  const Place place = tile_place(blockIdx.x, ceil_div(p.rows, BM), ceil_div(p.columns, BN), group_height);
  const int row0 = place.row * BM, column0 = place.column * BN, warp = threadIdx.x / 32;
  const int warp_row = warp / S::column_warps * S::warp_rows, warp_column = warp % S::column_warps * warp_columns;
  Sums<S> acc = {};
  sum_tile<T, BM, BN, Trans>(acc, p, row0, column0, warp_row, warp_column, shared);

  T* tile = reinterpret_cast<T*>(shared);
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const T* bias = static_cast<const T*>(p.bias);
#pragma unroll
  for (int j = 0; j < S::column_blocks; ++j) {
    const int column = warp_column + 8 * j + 2 * t;
    const float even = bias && column0 + column < p.columns ? static_cast<float>(bias[column0 + column]) : 0.0f;
    const float odd = bias && column0 + column + 1 < p.columns ? static_cast<float>(bias[column0 + column + 1]) : 0.0f;
#pragma unroll
    for (int i = 0; i < S::row_blocks; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        T* at = tile + (warp_row + 16 * i + 8 * half + g) * S::out_stride + column;
        *reinterpret_cast<Pair<T>*>(at) = {rounded<T>(acc[i][j][2 * half] + even),
                                           rounded<T>(acc[i][j][2 * half + 1] + odd)};
      }
  }
  __syncthreads();
  const bool aligned = (reinterpret_cast<uint64_t>(p.out) | (p.out_stride * sizeof(T))) % 16 == 0;
  constexpr int chunks = BN / per_chunk<T>;
  for (int i = threadIdx.x; i < BM * chunks; i += S::threads) {
    const int row = row0 + i / chunks, column = column0 + i % chunks * per_chunk<T>;
    if (row >= p.rows) break;
    const T* from = tile + i / chunks * S::out_stride + i % chunks * per_chunk<T>;
    T* to = static_cast<T*>(p.out) + row * p.out_stride + column;
    if (aligned && column + per_chunk<T> <= p.columns) {
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    } else {
      for (int e = 0; e < per_chunk<T> && column + e < p.columns; ++e) to[e] = from[e];
    }
  }
}

template <class T, int BM, int BN>
cudaError_t launch_as(const LinearParams& p, cudaStream_t stream) {
  using S = Shape<T, BM, BN>;
  const int tiles = ceil_div(p.rows, BM) * ceil_div(p.columns, BN);
  const auto kernel = p.w_trans ? linear_kernel<T, BM, BN, true> : linear_kernel<T, BM, BN, false>;
  return launch(kernel, tiles, S::threads, S::shared, p, stream);
}

}  // namespace

cudaError_t linear_launch(const LinearParams& p, cudaStream_t stream) {
  return by_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    if (p.rows <= 32) return launch_as<T, 32, 32>(p, stream);
    if constexpr (sizeof(T) == 2)
      if (ceil_div(p.rows, 128) * ceil_div(p.columns, 128) >= linear_wide_tiles)
        return launch_as<T, 128, 128>(p, stream);
    return launch_as<T, 64, 64>(p, stream);
  });
}

}  // namespace svdkern::cuda
