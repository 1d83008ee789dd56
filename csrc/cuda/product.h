// A warp's part of a product of two tiles (tile.h): acc += a b^T, 16 rows of a and 8 Columns rows of b, one tile deep.
//
// bf16 and f16: ldmatrix and mma.sync.m16n8k16, accumulated in float. f32: fused multiply-adds in the order of k, IEEE,
// into accumulators of the same layout: with g = lane / 4 and t = lane % 4, acc[j] has rows g, g, g + 8, g + 8 at
// columns 8 j + 2 t, the next, and the same again.
#pragma once

#include "ptx/ldmatrix.h"
#include "ptx/mma.h"
#include "tile.h"

namespace svdkern::cuda {

template <int Columns, class T>
__device__ inline void multiply(float (&acc)[Columns][4], const unsigned char* a, int a_row, const unsigned char* b,
                                int b_row) {
  const int lane = threadIdx.x % 32;
  const uint32_t a_at = static_cast<uint32_t>(__cvta_generic_to_shared(a));
  const uint32_t b_at = static_cast<uint32_t>(__cvta_generic_to_shared(b));
#pragma unroll
  for (int k = 0; k < row_chunks; k += 2) {
    uint32_t left[4];
    ptx::ldmatrix_x4(left, a_at + chunk_offset(a_row + lane % 16, k + lane / 16));
#pragma unroll
    for (int j = 0; j < Columns; j += 2) {
      uint32_t right[4];
      ptx::ldmatrix_x4(right, b_at + chunk_offset(b_row + 8 * j + lane % 8 + lane / 16 * 8, k + lane / 8 % 2));
      ptx::mma_m16n8k16(acc[j], left, right[0], right[1], T());
      ptx::mma_m16n8k16(acc[j + 1], left, right[2], right[3], T());
    }
  }
}

template <int Columns>
__device__ inline void multiply_f32(float (&acc)[Columns][4], const unsigned char* a, int a_row, const unsigned char* b,
                                    int b_row) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const auto chunk = [](const unsigned char* tile, int row, int k) {
    return *reinterpret_cast<const float4*>(tile + chunk_offset(row, k));
  };
  const auto add = [](float sum, float4 x, float4 y) {
    return fmaf(x.w, y.w, fmaf(x.z, y.z, fmaf(x.y, y.y, fmaf(x.x, y.x, sum))));
  };
#pragma unroll 2
  for (int k = 0; k < row_chunks; ++k) {
    const float4 upper = chunk(a, a_row + g, k), lower = chunk(a, a_row + g + 8, k);
#pragma unroll
    for (int j = 0; j < Columns; ++j) {
      const float4 even = chunk(b, b_row + 8 * j + 2 * t, k), odd = chunk(b, b_row + 8 * j + 2 * t + 1, k);
      acc[j][0] = add(acc[j][0], upper, even), acc[j][1] = add(acc[j][1], upper, odd);
      acc[j][2] = add(acc[j][2], lower, even), acc[j][3] = add(acc[j][3], lower, odd);
    }
  }
}

}  // namespace svdkern::cuda
