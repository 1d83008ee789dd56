// A tile of h = (D*a) F and of what follows from it: h for the backward, z = s (h sigma | h R) g for the next product.
//
// clang-format off
//            K, in steps of 128 bytes
//        +----+----+----+----+                        CTA: 64 or 128 rows of a, up to 128 ranks; warps of 16 rows each,
//  lines | s0 | s1 | s2 | .. |  x  the same of F      all ranks. cp.async brings step + stages - 1 while step is
//        +----+----+----+----+                        multiplied.
// clang-format on
//
// The tile of sums then goes through shared memory, where a core needs whole rows. Dropout masks a tile in shared
// memory before it is multiplied; D's factor is one multiplication of the sum.
#pragma once

#include "epilogue.h"
#include "product.h"

namespace svdkern::cuda {

template <class T, int Lines, int MostRanks>
struct ShrinkShape {
  static constexpr int lines = Lines, ranks = MostRanks, threads = Lines * 2;  // 16 rows a warp
  static constexpr int stages = ranks > 32 ? 3 : 4;
  static constexpr int a_bytes = lines * row_bytes, stage_bytes = a_bytes + ranks * row_bytes;
  static constexpr int sum_stride = ranks + 8;  // no bank conflicts where warps write their sums
  static constexpr int shared = stages * stage_bytes;
  static_assert(lines * sum_stride * sizeof(float) <= shared);
};

// acc += a f^T, 16 rows of a from a_row on, all ranks.
template <int Columns, class T>
__device__ inline void multiply_ranks(float (&acc)[Columns][4], const unsigned char* a, int a_row,
                                      const unsigned char* f) {
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

// The tile's sums over these steps of K, into shared memory: (lines, ranks), sum_stride apart.
template <class T, class S>
__device__ inline void sum_ranks(const ShrinkParams& p, int row0, int rank0, int first, int steps,
                                 unsigned char* shared) {
  const Source<T> a(p.a, p.a_stride, p.rows, p.width), f(p.factor, p.factor_stride, p.r, p.width);
  const Philox philox(p.keep);
  const auto copy = [&](int step) {
    if (step < steps) {
      unsigned char* stage = shared + step % S::stages * S::stage_bytes;
      copy_tile<S::lines, row_chunks, S::threads>(stage, a, row0, (first + step) * row_elements<T>);
      copy_tile<S::ranks, row_chunks, S::threads>(stage + S::a_bytes, f, rank0, (first + step) * row_elements<T>);
    }
    ptx::cp_async_commit_group();  // an empty one counts too
  };
  float acc[S::ranks / 8][4] = {};
  const int warp_row = threadIdx.x / 32 * 16;
#pragma unroll
  for (int step = 0; step < S::stages - 1; ++step) copy(step);
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait_group<S::stages - 2>();
    unsigned char* stage = shared + step % S::stages * S::stage_bytes;
    if (philox.threshold)
      mask_tile<S::lines, row_chunks, S::threads, T>(stage, philox, row0, (first + step) * row_elements<T>);
    __syncthreads();             // this step has come for all, and the last one is read to its end by all
    copy(step + S::stages - 1);  // over the last one
    multiply_ranks<S::ranks / 8, T>(acc, stage, warp_row, stage + S::a_bytes);
  }
  ptx::cp_async_wait_group<0>();
  __syncthreads();  // the stages are free
  store_sums(reinterpret_cast<float*>(shared), S::sum_stride, warp_row, acc, p.keep_scale);
  __syncthreads();
}

// Calls what(row, rank, the row's sums) for every element of the tile that there is.
template <class S, class What>
__device__ inline void each_sum(const ShrinkParams& p, int row0, int rank0, unsigned char* shared, What what) {
  float* sums = reinterpret_cast<float*>(shared);
  for (int i = threadIdx.x; i < S::lines * S::ranks; i += S::threads) {
    const int row = row0 + i / S::ranks, rank = rank0 + i % S::ranks;
    if (row < p.rows && rank < padded(p.r)) what(row, rank, sums + i / S::ranks * S::sum_stride);
  }
}

// h and z from the tile's sums.
template <class T, class S>
__device__ inline void store_ranks(const ShrinkParams& p, int row0, int rank0, unsigned char* shared) {
  const float scale = load(p.by.scale);
  each_sum<S>(p, row0, rank0, shared, [&](int64_t row, int rank, float* line) {
    if (p.h && rank < p.r) p.h[row * p.r + rank] = line[rank - rank0];
    if (p.z) {
      const float z = rank < p.r ? modulated(p.by, line - rank0, row, rank, p.r, scale) : 0.0f;
      static_cast<T*>(p.z)[row * padded(p.r) + rank] = rounded<T>(z);
    }
  });
}

}  // namespace svdkern::cuda
