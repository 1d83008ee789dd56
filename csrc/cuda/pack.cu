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

constexpr int threads = 128, rows = 64, ranks = 16, stride = rows + 2;  // no bank conflicts

template <class T>
__device__ void pack_tile(const PackedFactor& f, int r, int row0, int rank0, float* tile) {
  for (int i = threadIdx.x; i < rows * ranks; i += threads) {
    const bool along_ranks = f.rank_stride == 1;
    const int row = along_ranks ? i / ranks : i % rows, rank = along_ranks ? i % ranks : i / rows;
    float value = 0.0f;
    if (row0 + row < f.length && rank0 + rank < r)
      value = load(f.in, f.dtype, (row0 + row) * f.row_stride + (rank0 + rank) * f.rank_stride);
    tile[rank * stride + row] = value;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < rows * ranks / per_chunk<T>; i += threads) {
    const int across = (f.rows ? ranks : rows) / per_chunk<T>;  // chunks of a row of the output
    const int line = i / across, first = i % across * per_chunk<T>;
    const int row = f.rows ? line : first, rank = f.rows ? first : line;
    Chunk<T> chunk;
#pragma unroll
    for (int e = 0; e < per_chunk<T>; ++e)
      chunk.element[e] = rounded<T>(tile[(f.rows ? rank + e : rank) * stride + (f.rows ? row : row + e)]);
    const int64_t at = f.rows ? (row0 + row) * f.out_stride + rank0 + rank : (rank0 + rank) * f.out_stride + row0 + row;
    if (row0 + row < (f.rows ? f.length : f.out_stride))
      *reinterpret_cast<uint4*>(static_cast<T*>(f.out) + at) = chunk.bits;
  }
}

template <class T>
__global__ void __launch_bounds__(threads) pack_kernel(const PackParams p) {
  __shared__ float tile[ranks * stride];
  if (blockIdx.x == 0)
    for (int i = threadIdx.x; i < p.counters; i += threads) p.control[i] = 0;
  const int first = ceil_div(p.factors[0].length, rows);
  const bool second = blockIdx.x >= first;
  const PackedFactor& f = second ? p.factors[1] : p.factors[0];
  const int row0 = (second ? blockIdx.x - first : blockIdx.x) * rows;
  for (int rank0 = 0; rank0 < padded(p.r); rank0 += ranks) {
    __syncthreads();  // the tile is read to its end
    pack_tile<T>(f, p.r, row0, rank0, tile);
  }
}

}  // namespace

cudaError_t probe() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(pack_kernel<float>));
}

cudaError_t pack_launch(const PackParams& p, cudaStream_t stream) {
  const int tiles = ceil_div(p.factors[0].length, rows) + ceil_div(p.factors[1].length, rows);
  return by_dtype(p.dtype, [&](auto t) { return launch(pack_kernel<decltype(t)>, tiles, threads, 0, p, stream); });
}

}  // namespace svdkern::cuda
