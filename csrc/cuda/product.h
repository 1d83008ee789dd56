// Fragments of tiles (tile.h) for the tensor cores, and a warp's part of a product of two tiles.
//
// A fragment is 16 rows of a, or 8 columns of b twice, at 16 values of k: two chunks of a row where k runs along rows,
// 16 rows where it runs down them (_trans). f32 has no such instruction that keeps its precision: fused multiply-adds
// in the order of k, into accumulators of the same layout: with g = lane / 4 and t = lane % 4, acc[j] has rows g, g, g
// + 8, g + 8 at columns 8 j + 2 t, the next, and the same again.
#pragma once

#include "ptx/ldmatrix.h"
#include "ptx/mma.h"
#include "tile.h"

namespace svdkern::cuda {

using Fragment = uint32_t[4];

__device__ inline uint32_t shared_address(const unsigned char* tile, int row, int chunk) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(tile + chunk_offset(row, chunk)));
}

// a: rows row ... row + 15, chunks chunk and the next.
__device__ inline void load_a(Fragment& d, const unsigned char* tile, int row, int chunk) {
  const int lane = threadIdx.x % 32;
  ptx::ldmatrix_x4(d, shared_address(tile, row + lane % 16, chunk + lane / 16));
}

// The same of a^T: a's rows are the tile's columns, chunks chunk and the next; k is its rows k ... k + 15.
__device__ inline void load_a_trans(Fragment& d, const unsigned char* tile, int k, int chunk) {
  const int lane = threadIdx.x % 32;
  ptx::ldmatrix_x4_trans(d, shared_address(tile, k + lane % 8 + lane / 16 * 8, chunk + lane / 8 % 2));
}

// b of two products: columns are the tile's rows row ... row + 7 and the next 8, k its chunks chunk and the next.
__device__ inline void load_b(Fragment& d, const unsigned char* tile, int row, int chunk) {
  const int lane = threadIdx.x % 32;
  ptx::ldmatrix_x4(d, shared_address(tile, row + lane % 8 + lane / 16 * 8, chunk + lane / 8 % 2));
}

// The same of b^T: columns are the tile's chunks chunk and the next, k its rows k ... k + 15.
__device__ inline void load_b_trans(Fragment& d, const unsigned char* tile, int k, int chunk) {
  const int lane = threadIdx.x % 32;
  ptx::ldmatrix_x4_trans(d, shared_address(tile, k + lane % 16, chunk + lane / 16));
}

// acc[j] += a b_j for the two columns' blocks of a fragment.
template <class T>
__device__ inline void multiply_pair(float (&even)[4], float (&odd)[4], const Fragment& a, const Fragment& b) {
  ptx::mma_m16n8k16(even, a, b[0], b[1], T());
  ptx::mma_m16n8k16(odd, a, b[2], b[3], T());
}

// ------------------------------------------------------------------------------------------------------------ f32

__device__ inline const float& element(const unsigned char* tile, int row, int column) {
  return *reinterpret_cast<const float*>(tile + chunk_offset(row, column / 4) + column % 4 * 4);
}

__device__ inline float4 four(const unsigned char* tile, int row, int chunk) {
  return *reinterpret_cast<const float4*>(tile + chunk_offset(row, chunk));
}

// acc += a b^T at one chunk of k: 16 rows of a from a_row on, 8 Columns rows of b from b_row on.
template <int Columns>
__device__ inline void multiply_f32(float (&acc)[Columns][4], const unsigned char* a, int a_row, const unsigned char* b,
                                    int b_row, int chunk) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const auto add = [](float sum, float4 x, float4 y) {
    return fmaf(x.w, y.w, fmaf(x.z, y.z, fmaf(x.y, y.y, fmaf(x.x, y.x, sum))));
  };
  const float4 upper = four(a, a_row + g, chunk), lower = four(a, a_row + g + 8, chunk);
#pragma unroll
  for (int j = 0; j < Columns; ++j) {
    const float4 even = four(b, b_row + 8 * j + 2 * t, chunk), odd = four(b, b_row + 8 * j + 2 * t + 1, chunk);
    acc[j][0] = add(acc[j][0], upper, even), acc[j][1] = add(acc[j][1], upper, odd);
    acc[j][2] = add(acc[j][2], lower, even), acc[j][3] = add(acc[j][3], lower, odd);
  }
}

// ------------------------------------------------------------------------------------------------------------ sums

// A warp's sums into rows of floats, `stride` apart: from `row` on, and from the first column.
template <int Columns>
__device__ inline void store_sums(float* sums, int stride, int row, const float (&acc)[Columns][4], float factor) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int j = 0; j < Columns; ++j)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      *reinterpret_cast<float2*>(sums + (row + g + 8 * half) * stride + 8 * j + 2 * t) =
          make_float2(acc[j][2 * half] * factor, acc[j][2 * half + 1] * factor);
}

}  // namespace svdkern::cuda
