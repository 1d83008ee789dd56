// Factors as the product kernels want them: cast to T, r padded with zeros to R (a multiple of 16), rows of whole 16
// bytes.
//
//   factor (L, r), any strides and float dtype  ->  rows (L, R)   or   columns (R, L)
//
// One launch packs both factors of a layer, 64 rows of one of them a CTA, 16 ranks at a time through shared memory:
//
//   in, along its unit stride        tile [16 ranks][64 rows], float       out, 16 bytes a thread
//
// CTA 0 also zeroes the counters of the launches that follow. Floor: one read of the factors, L r numbers; every call
// packs anew, so nobody has to say when a factor changed.
#include "element.h"
#include "launch.h"

namespace svdkern::cuda {
namespace {

constexpr int threads = 128, tile_rows = 64, tile_ranks = 16, tile_stride = tile_rows + 2;  // no bank conflicts

template <class T>
__device__ void pack_tile(const PackedFactor& f, int r, int row0, int rank0, float* tile) {
  for (int i = threadIdx.x; i < tile_rows * tile_ranks; i += threads) {
    const bool along_ranks = f.rank_stride == 1;
    const int row = along_ranks ? i / tile_ranks : i % tile_rows, rank = along_ranks ? i % tile_ranks : i / tile_rows;
    float value = 0.0f;
    if (row0 + row < f.length && rank0 + rank < r)
      value = load(f.in, f.dtype, (row0 + row) * f.row_stride + (rank0 + rank) * f.rank_stride);
    tile[rank * tile_stride + row] = value;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < tile_rows * tile_ranks / per_chunk<T>; i += threads) {
    const int across = (f.rows ? tile_ranks : tile_rows) / per_chunk<T>;  // chunks of a row of the output
    const int line = i / across, first = i % across * per_chunk<T>;
    const int row = f.rows ? line : first, rank = f.rows ? first : line;
    Chunk<T> chunk;
#pragma unroll
    for (int e = 0; e < per_chunk<T>; ++e)
      chunk.element[e] = rounded<T>(tile[(f.rows ? rank + e : rank) * tile_stride + (f.rows ? row : row + e)]);
    const int64_t at = f.rows ? (row0 + row) * f.out_stride + rank0 + rank : (rank0 + rank) * f.out_stride + row0 + row;
    if (row0 + row < (f.rows ? f.length : f.out_stride))
      *reinterpret_cast<uint4*>(static_cast<T*>(f.out) + at) = chunk.bits;
  }
}

template <class T>
__global__ void __launch_bounds__(threads) pack_kernel(const PackParams p) {
  __shared__ float tile[tile_ranks * tile_stride];
  if (blockIdx.x == 0)
    for (int i = threadIdx.x; i < p.counters; i += threads) p.control[i] = 0;
  const int first = ceil_div(p.factors[0].length, tile_rows);
  const bool second = blockIdx.x >= first;
  const PackedFactor& f = second ? p.factors[1] : p.factors[0];
  const int row0 = (second ? blockIdx.x - first : blockIdx.x) * tile_rows;
  for (int rank0 = 0; rank0 < padded(p.r); rank0 += tile_ranks) {
    __syncthreads();  // the tile is read to its end
    pack_tile<T>(f, p.r, row0, rank0, tile);
  }
}

}  // namespace

cudaError_t pack_launch(const PackParams& p, cudaStream_t stream) {
  const int tiles = ceil_div(p.factors[0].length, tile_rows) + ceil_div(p.factors[1].length, tile_rows);
  return by_dtype(p.dtype, [&](auto t) { return launch(pack_kernel<decltype(t)>, tiles, threads, 0, p, stream); });
}

}  // namespace svdkern::cuda
