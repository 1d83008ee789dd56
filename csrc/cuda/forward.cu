// The whole forward in one persistent launch: y = x W + z V^T + b with h = (D*x) U, z = s (h sigma | h R) g.
//
// clang-format off
//   tickets    | z of 16 row groups | their tiles of y, rows first | z of the next 16 | ...
//
//   a z-tile (shrink_tile.h)     its rows' h and z, then the row group's counter is raised
//   a y-tile (linear_tile.h)     the steps of K; the counter is looked at one step before z's copy; the adapter's step
// clang-format on
//
// Tiles are handed out by a ticket, and a y-tile depends on z-tiles of lower tickets: what a CTA waits for is held by
// one that runs, whatever else the GPU does. Who takes which tile changes no bit. Ticket and counters are zeroed by
// pack, which stands before in the same stream or graph. z comes by cp.async, through the L2, never by the read-only
// path.
//
// Floor: that of the frozen product and r (K + N) / (K N) of its operations: x comes into the L2 for the z-tile and is
// there for the y-tiles, y is written once and not read.
#include "launch.h"
#include "linear_tile.h"
#include "ptx/atom.h"
#include "shrink_tile.h"

namespace svdkern::cuda {
namespace {

// z-tiles of a row group: by rows and by ranks.
template <class S, class Z>
__host__ __device__ constexpr int z_tiles(int r) {
  return S::BM / Z::lines * ceil_div(r, Z::ranks);
}

template <class T, int BN, int Ranks>
__global__ void __launch_bounds__(LinearShape<T, 128, BN>::threads, LinearShape<T, 128, BN>::ctas)
    forward_kernel(const ForwardParams p) {
  using S = LinearShape<T, 128, BN>;
  using Z = ShrinkShape<T, S::threads / 2, Ranks>;
  static_assert(Z::shared <= S::shared);
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ int taken;
  const LinearParams& linear = p.linear;
  constexpr int height = group_height(BN);
  const int row_groups = ceil_div(linear.rows, S::BM), column_tiles = ceil_div(linear.columns, BN);
  const int of_z = z_tiles<S, Z>(linear.r), per_group = of_z + column_tiles;
  int *const ticket = p.control, *const counters = p.control + 1;
  int next = 0;
  const auto draw = [&] { next = ptx::atom_add_relaxed_gpu(ticket, 1, threadIdx.x == 0); };
  draw();
  while (true) {
    if (threadIdx.x == 0) taken = next;  // over one that all have read: every tile has barriers of its own
    __syncthreads();  // the ticket is there, and the last tile's shared memory is read to its end by all
    if (taken >= row_groups * per_group) break;
    const int first = taken / (height * per_group) * height, groups = min(height, row_groups - first);
    int place = taken - first * per_group;
    if (place < groups * of_z) {
      const int group = first + place % groups, piece = place / groups, lines = S::BM / Z::lines;
      const int row0 = group * S::BM + piece % lines * Z::lines, rank0 = piece / lines * Ranks;
      sum_ranks<T, Z>(p.shrink, row0, rank0, 0, ceil_div(p.shrink.width, row_elements<T>), shared);
      store_ranks<T, Z>(p.shrink, row0, rank0, shared);
      publish(counters + group);
      draw();
    } else {
      place -= groups * of_z;
      const int group = first + place % groups;
      const TilePlace<S> at(group * S::BM, place / groups * BN);
      Sums<S> acc = {};
      sum_tile<T, S, false, false>(acc, linear, at, shared, {counters + group, of_z});
      draw();  // its way to the L2 and back is hidden by the stores
      store_tile<T, S>(acc, linear, at, shared);
    }
  }
}

template <class T, int BN, int Ranks>
cudaError_t launch_as(const ForwardParams& p, int processors, cudaStream_t stream) {
  using S = LinearShape<T, 128, BN>;
  using Z = ShrinkShape<T, S::threads / 2, Ranks>;
  const LinearParams& linear = p.linear;
  const int tiles = ceil_div(linear.rows, S::BM) * (z_tiles<S, Z>(linear.r) + ceil_div(linear.columns, BN));
  const int ctas = S::ctas * processors;
  return launch(forward_kernel<T, BN, Ranks>, tiles < ctas ? tiles : ctas, S::threads, S::shared, p, stream);
}

template <class T, int BN>
cudaError_t launch_for(const ForwardParams& p, int processors, cudaStream_t stream) {
  if (p.linear.r <= 16) return launch_as<T, BN, 16>(p, processors, stream);
  if (p.linear.r <= 64) return launch_as<T, BN, 64>(p, processors, stream);
  return launch_as<T, BN, tile_ranks>(p, processors, stream);
}

Tile tile_of(const LinearParams& p, DeviceLimits limits) {
  if (p.dtype == DType::f32 || p.rows <= small_rows || p.w_trans) return Tile::small;
  return linear_tile(p.rows, p.columns, whole_chunks(p), limits);
}

}  // namespace

bool forward_serves(const LinearParams& p) { return tile_of(p, device_limits()) != Tile::small; }

cudaError_t forward_launch(const ForwardParams& p, cudaStream_t stream) {
  const DeviceLimits limits = device_limits();
  return by_dtype(p.linear.dtype, [&](auto t) {
    using T = decltype(t);
    if constexpr (sizeof(T) == 2) {
      switch (tile_of(p.linear, limits)) {
        case Tile::wide:
          return launch_for<T, 256>(p, limits.processors, stream);
        case Tile::square:
          return launch_for<T, 128>(p, limits.processors, stream);
        case Tile::small:
          break;
      }
    }
    return cudaErrorInvalidValue;
  });
}

}  // namespace svdkern::cuda
