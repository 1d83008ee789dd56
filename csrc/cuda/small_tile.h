// What a warp of small_linear copies and multiplies: a step of 32 columns of out, and all rows of a.
#pragma once

#include "product.h"

namespace svdkern::cuda::few {

constexpr int any_shared = 98 << 10;  // of a CTA: what all GPUs have, less what the kernel declares itself
constexpr int large_shared = 160 << 10;
constexpr int warps = 4;  // of the product, and as many of the adapter
constexpr int threads = 2 * warps * 32, columns = small_columns;
constexpr int ranks = 128;                    // of the adapter at a time
constexpr int w_bytes = columns * row_bytes;  // of a step: 128 bytes of k for each column
constexpr int rank_stride = ranks + 16;       // of h; no bank conflicts where threads go along 16 ranks or 32
constexpr int sum_stride = columns + 4;       // no bank conflicts where warps write their sums

// Large: for the CTA that has a processor for itself.
template <class T, int Rows, bool Large = false>
struct Shape {
  static constexpr int a_bytes = Rows * row_bytes, stage_bytes = w_bytes + a_bytes;
  static constexpr int panels = ranks / row_elements<T>, h_bytes = Rows * rank_stride * sizeof(float);
  static constexpr int factor_bytes = panels * w_bytes > h_bytes ? panels * w_bytes : h_bytes;  // h's place, then F's
  static constexpr int adapter_bytes = factor_bytes + panels * a_bytes;
  static constexpr int free = (Large ? large_shared : any_shared) - adapter_bytes, fit = free / (warps * stage_bytes);
  static constexpr int stages = fit < 4 ? fit : 4;
  static constexpr int warp_bytes = stages * stage_bytes, shared = warps * warp_bytes + adapter_bytes;
  static constexpr int slices = sizeof(T) == 2 ? 4 : 8;                // of a step: 16 k of 16 bits, 4 of f32
  static constexpr int sum_bytes = Rows * sum_stride * sizeof(float);  // of a warp
  static_assert(panels <= warps && stages >= 2 && sum_bytes <= warp_bytes && warps * sum_bytes <= factor_bytes);
};

// A warp's sums of 32 columns of out and all rows. 16 bits: of 16 columns and 8 rows as mma has them; f32: a lane has
// columns lane % 16 and the 16th from there, of every other four k.
template <class T, int Rows>
struct Sums {
  float of[2][Rows / 8][4] = {};
};
template <int Rows>
struct Sums<float, Rows> {
  float of[2][Rows] = {};
};

// ---------------------------------------------------------------------------------------------------------- copies

// Where chunk `chunk` of a row of Chunks lies: tile.h's place, or with rows of 64 bytes the same of their pairs.
template <int Chunks>
__device__ inline constexpr int place(int row, int chunk) {
  return Chunks == row_chunks ? chunk_offset(row, chunk) : row * (16 * Chunks) + ((chunk ^ (row / 2 % Chunks)) << 4);
}

// Starts to copy Rows rows of Chunks chunks, from row0 and column0 on, by one warp; zeros outside.
template <int Rows, int Chunks, class T>
__device__ inline void copy_rows(unsigned char* tile, const Source<T>& from, int row0, int column0) {
  const int lane = threadIdx.x % 32, chunk = lane % Chunks, column = column0 + chunk * per_chunk<T>;
  const int left = max(min(from.columns - column, per_chunk<T>), 0);
#pragma unroll 2
  for (int i = 0; i < Rows; i += 32 / Chunks) {
    const int row = i + lane / Chunks, elements = row0 + row < from.rows ? left : 0;
    const T* at = from.data + (row0 + row) * from.stride + column;  // not looked at where nothing is left
    unsigned char* to = tile + place<Chunks>(row, chunk);
    if (from.aligned) {
      ptx::cp_async_16(static_cast<uint32_t>(__cvta_generic_to_shared(to)), at, elements * static_cast<int>(sizeof(T)));
    } else {
      Chunk<T> copied;
#pragma unroll
      for (int e = 0; e < per_chunk<T>; ++e)
        if (e < elements) copied.element[e] = at[e];
      *reinterpret_cast<uint4*>(to) = copied.bits;
    }
  }
}

__device__ inline uint32_t as_shared(const unsigned char* at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}

// This lane's value, of which ptxas does not know how it came about: it computes others anew in every step.
__device__ inline uint32_t kept(uint32_t value) { return __shfl_sync(~0u, value, threadIdx.x % 32); }

// A lane's part of whole tiles, one after another: every 32 / Chunks-th of Rows rows, its chunk. Where they come from
// is known once, and goes on by `step` elements from tile to tile; where they go to is at two places and their
// multiples, since the permutation of chunks comes again after eight rows.
template <class T, int Rows, int Chunks>
struct LaneCopies {
  static constexpr int apart = 32 / Chunks, count = Rows / apart;
  const T* from[count];
  uint32_t to[2];

  // Rows past `last` are it again: their products are not looked at.
  __device__ LaneCopies(const Source<T>& source, int row0, int last, int column0, int last_column) {
    const int row = threadIdx.x % 32 / Chunks, chunk = threadIdx.x % Chunks;
    const T* at = source.data + min(column0 + chunk * per_chunk<T>, last_column);
#pragma unroll
    for (int i = 0; i < count; ++i) from[i] = at + min(row0 + row + i * apart, last) * source.stride;
    to[0] = kept(place<Chunks>(row, chunk)), to[1] = kept(place<Chunks>(row + apart, chunk) - apart * 16 * Chunks);
  }

  // Those of the first `rows` of them.
  __device__ void copy(uint32_t tile, int rows = Rows) const {
#pragma unroll
    for (int i = 0; i < count; ++i)
      if (static_cast<int>(threadIdx.x) % 32 / Chunks + i * apart < rows)
        ptx::cp_async_16(tile + to[i % 2] + i * apart * 16 * Chunks, from[i]);
  }

  __device__ void go_on(int64_t step) {
#pragma unroll
    for (int i = 0; i < count; ++i) from[i] += step;
  }
};

// -------------------------------------------------------------------------------------------------------- products

// Where a lane reads fragments of 16 bits, in the first slice: along rows of w and a, the others are at the address
// exclusive or 32 k (tile.h); down the rows of w, 16 of them further, and two chunks on at the address exclusive or 32.
template <int Rows, bool Trans>
struct Lanes {
  uint32_t w, a;

  __device__ Lanes() {
    const int lane = threadIdx.x % 32, matrix = lane / 8;
    w = kept(Trans ? place<4>(lane % 8 + matrix / 2 * 8, matrix % 2) : chunk_offset(lane % 16, lane / 16));
    a = kept(chunk_offset(Rows == 8 ? lane % 8 : lane % 8 + matrix / 2 * 8, matrix % 2));
  }
};

// acc += w a^T at the first `slices` of a step: w's rows are columns of out, with Trans w's columns are.
template <class T, int Rows, bool Trans>
__device__ __forceinline__ void multiply(Sums<T, Rows>& acc, const Lanes<Rows, Trans>& lanes, const unsigned char* w,
                                         const unsigned char* a, int slices) {
  if constexpr (sizeof(T) == 2) {
    const uint32_t w_at = as_shared(w) + lanes.w, a_at = as_shared(a) + lanes.a;
#pragma unroll
    for (int k = 0; k < Shape<T, Rows>::slices; ++k) {
      if (k >= slices) break;
      Fragment left, right[ceil_div(Rows, 16)];
      if constexpr (Rows == 8)
        ptx::ldmatrix_x2(right[0][0], right[0][1], a_at ^ (k << 5));
      else
#pragma unroll
        for (int j = 0; j < Rows / 16; ++j) ptx::ldmatrix_x4(right[j], (a_at ^ (k << 5)) + j * 16 * row_bytes);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if constexpr (Trans)
          ptx::ldmatrix_x4_trans(left, (w_at ^ (i << 5)) + k * 16 * row_bytes / 2);
        else
          ptx::ldmatrix_x4(left, (w_at ^ (k << 5)) + i * 16 * row_bytes);
#pragma unroll
        for (int j = 0; j < Rows / 8; ++j)
          ptx::mma_m16n8k16(acc.of[i][j], left, right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1], T());
      }
    }
  } else {
    const int column = threadIdx.x % 16, half = threadIdx.x / 16 % 2;
#pragma unroll 1
    for (int k = half; k < slices; k += 2) {
      float4 left[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int at = 16 * i + column;
        if constexpr (Trans)
          left[i] = make_float4(element(w, 4 * k, at), element(w, 4 * k + 1, at), element(w, 4 * k + 2, at),
                                element(w, 4 * k + 3, at));
        else
          left[i] = four(w, at, k);
      }
#pragma unroll
      for (int row = 0; row < Rows; ++row) {
        const float4 x = four(a, row, k);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& sum = acc.of[i][row];
          sum = fmaf(left[i].w, x.w, fmaf(left[i].z, x.z, fmaf(left[i].y, x.y, fmaf(left[i].x, x.x, sum))));
        }
      }
    }
  }
}

}  // namespace svdkern::cuda::few
