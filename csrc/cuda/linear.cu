// out = a w + D*(z F^T) + bias, rounded once. linear_tile.h has the tile and its pipeline.
//
//   a (M, K) row-major, T     w (N, K) row-major, or (K, N) contracted down its rows     z (M, R) T     F packed (N, R)
//
// A CTA makes one tile: 128 x 256 (16 bits), 128 x 128 (16 bits), or 64 x 64, whichever is
// least work in whole rounds of the processors (linear_tile in params.h). Floor: 2 M N (K + R) operations; a, w and out
// once, w from the L2 for every group of row tiles but the first.
#include "launch.h"
#include "linear_tile.h"

namespace svdkern::cuda {
namespace {

template <class T, int BM, int BN, bool Down>
__global__ void __launch_bounds__(LinearShape<T, BM, BN>::threads, LinearShape<T, BM, BN>::ctas)
    linear_kernel(const LinearParams p) {
  using S = LinearShape<T, BM, BN>;
  extern __shared__ __align__(128) unsigned char shared[];
  const Place place = tile_place(blockIdx.x, ceil_div(p.rows, BM), ceil_div(p.columns, BN), group_height(BN));
  const TilePlace<S> at(place.row * BM, place.column * BN);
  Sums<S> acc = {};
  sum_tile<T, S, Down, true>(acc, p, at, shared, Awaited());
  store_tile<T, S>(acc, p, at, shared);
}

template <class T, int BM, int BN>
cudaError_t launch_as(const LinearParams& p, cudaStream_t stream) {
  using S = LinearShape<T, BM, BN>;
  const int tiles = ceil_div(p.rows, BM) * ceil_div(p.columns, BN);
  const auto kernel = p.w_trans ? linear_kernel<T, BM, BN, true> : linear_kernel<T, BM, BN, false>;
  return launch(kernel, tiles, S::threads, S::shared, p, stream);
}

}  // namespace

cudaError_t linear_launch(const LinearParams& p, cudaStream_t stream) {
  return by_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    if constexpr (sizeof(T) == 2) {
      switch (linear_tile(p.rows, p.columns, whole_chunks(p), device_limits())) {
        case Tile::wide:
          return launch_as<T, 128, 256>(p, stream);
        case Tile::square:
          return launch_as<T, 128, 128>(p, stream);
        case Tile::small:
          break;
      }
    }
    return launch_as<T, 64, 64>(p, stream);
  });
}

}  // namespace svdkern::cuda
