// h = (D*a) F and z = s (h sigma | h R) g, in one pass over a. shrink_tile.h has the tile.
//
//   a (M, K) row-major, T        F packed (R, K)        h (M, r) float        z (M, R) T, zeros past r
//
// A CTA makes a tile of 64 rows and up to 128 ranks, or one split of K of it: few tiles are cut along K (splits.h).
// Floor: one read of a, M K numbers; 2 M K r operations beside it. More than 128 ranks read a again, from the L2.
#include "launch.h"
#include "shrink_tile.h"
#include "splits.h"

namespace svdkern::cuda {
namespace {

// CTAs of a processor, at least: what registers allow without spills.
template <class T, int Ranks>
constexpr int ctas = sizeof(T) == 4 ? 1
                     : Ranks > 64   ? 2
                                    : 4;

template <class T, int Ranks>
__global__ void __launch_bounds__(ShrinkShape<T, tile_lines, Ranks>::threads, ctas<T, Ranks>)
    shrink_kernel(const ShrinkParams p) {
  using S = ShrinkShape<T, tile_lines, Ranks>;
  extern __shared__ __align__(128) unsigned char shared[];
  const int row0 = blockIdx.x * tile_lines, rank0 = blockIdx.y * Ranks, R = padded(p.r);
  const int all = ceil_div(p.width, row_elements<T>), each = ceil_div(all, p.splits.splits);
  const int first = blockIdx.z * each;
  sum_ranks<T, S>(p, row0, rank0, first, min(each, all - first), shared);
  const bool mine = add_splits(
      p.splits, blockIdx.z, blockIdx.x * gridDim.y + blockIdx.y, static_cast<int64_t>(p.rows) * R, [&](auto what) {
        each_sum<S>(p, row0, rank0, shared,
                    [&](int64_t row, int rank, float* line) { what(row * R + rank, line[rank - rank0]); });
      });
  if (mine) store_ranks<T, S>(p, row0, rank0, shared);
}

}  // namespace

cudaError_t shrink_launch(const ShrinkParams& p, cudaStream_t stream) {
  return by_dtype(p.dtype, [&](auto t) {
    return by_ranks(p.r, [&](auto ranks) {
      using T = decltype(t);
      constexpr int Ranks = decltype(ranks)::value;
      const dim3 grid(ceil_div(p.rows, tile_lines), ceil_div(p.r, Ranks), p.splits.splits);
      using S = ShrinkShape<T, tile_lines, Ranks>;
      return launch(shrink_kernel<T, Ranks>, grid, S::threads, S::shared, p, stream);
    });
  });
}

}  // namespace svdkern::cuda
