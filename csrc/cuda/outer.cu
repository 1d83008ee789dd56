// out = (D*a)^T q: the gradient of a factor, in one pass over a. dU = (D*x)^T q, dV = dy^T z.
//
//   a (M, L) row-major, T        q (M, R) T, contiguous        out (L, r), any dtype and strides
//
// clang-format off
//              64 columns of a       ranks                CTA: 64 columns of a, up to 128 ranks, one split of M; four
//            +-----------------+   +-------+              warps of 16 columns each, all ranks. Both operands are read
//   M, in    |       s0        |   |  s0   |              down their columns (ldmatrix.trans); out stays in registers
//   steps    +-----------------+   +-------+              while M goes by. Stages steps are in shared memory, in panels
//            |       s1        |   |  s1   |              of 128-byte rows.
// clang-format on
//
// Dropout masks a tile in shared memory before it is multiplied. Few tiles are cut along M (splits.h), which is the
// rule: a layer has few columns and many rows. Floor: one read of a, M L numbers. More than 128 ranks read a again,
// from the L2.
#include "launch.h"
#include "product.h"
#include "splits.h"

namespace svdkern::cuda {
namespace {

constexpr int threads = 128;

template <class T, int Ranks>
struct Shape {
  static constexpr int depth = row_elements<T>;                                   // rows of a step: 64, or 32 of f32
  static constexpr int panel = row_elements<T>, panel_bytes = depth * row_bytes;  // columns of a panel
  static constexpr int a_panels = tile_lines / panel, q_panels = ceil_div(Ranks, panel);
  static constexpr int q_chunks = (Ranks < panel ? Ranks : panel) / per_chunk<T>;  // of a row that are copied
  static constexpr int stages = Ranks > 32 ? 3 : 4;
  static constexpr int stage_bytes = (a_panels + q_panels) * panel_bytes, shared = stages * stage_bytes;
  static constexpr int sum_stride = Ranks + 8;
  static_assert(tile_lines * sum_stride * sizeof(float) <= shared);
};

// acc += a^T q of one step: this warp's 16 columns of a, all ranks.
template <class T, int Ranks>
__device__ void multiply_tiles(float (&acc)[Ranks / 8][4], const unsigned char* stage, int line) {
  using S = Shape<T, Ranks>;
  const unsigned char* a = stage + line / S::panel * S::panel_bytes;
  const unsigned char* q = stage + S::a_panels * S::panel_bytes;
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int k = 0; k < S::depth; k += 16) {
      Fragment left, right;
      load_a_trans(left, a, k, line % S::panel / 8);
#pragma unroll
      for (int j = 0; j < Ranks / 8; j += 2) {
        load_b_trans(right, q + j / 8 * S::panel_bytes, k, j % 8);
        multiply_pair<T>(acc[j], acc[j + 1], left, right);
      }
    }
  } else {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, column = line % S::panel + g;
#pragma unroll 2
    for (int k = 0; k < S::depth; ++k) {
      const float upper = element(a, k, column), lower = element(a, k, column + 8);
#pragma unroll
      for (int j = 0; j < Ranks / 8; ++j) {
        const float2 right =
            *reinterpret_cast<const float2*>(&element(q + j / 4 * S::panel_bytes, k, j % 4 * 8 + 2 * t));
        acc[j][0] = fmaf(upper, right.x, acc[j][0]), acc[j][1] = fmaf(upper, right.y, acc[j][1]);
        acc[j][2] = fmaf(lower, right.x, acc[j][2]), acc[j][3] = fmaf(lower, right.y, acc[j][3]);
      }
    }
  }
}

template <class T, int Ranks>
__device__ void sum_tile(const OuterParams& p, int line0, int rank0, unsigned char* shared) {
  using S = Shape<T, Ranks>;
  const int R = padded(p.r);
  const Source<T> a(p.a, p.a_stride, p.rows, p.width), q(p.q, R, p.rows, R);
  const Philox philox(p.keep);
  const int all = ceil_div(p.rows, S::depth), each = ceil_div(all, p.splits.splits);
  const int first = blockIdx.z * each, steps = min(each, all - first);
  const auto copy = [&](int step) {
    if (step < steps) {
      unsigned char* stage = shared + step % S::stages * S::stage_bytes;
      const int row0 = (first + step) * S::depth;
#pragma unroll
      for (int i = 0; i < S::a_panels; ++i)
        copy_tile<S::depth, row_chunks, threads>(stage + i * S::panel_bytes, a, row0, line0 + i * S::panel);
#pragma unroll
      for (int i = 0; i < S::q_panels; ++i)
        copy_tile<S::depth, S::q_chunks, threads>(stage + (S::a_panels + i) * S::panel_bytes, q, row0,
                                                  rank0 + i * S::panel);
    }
    ptx::cp_async_commit_group();  // an empty one counts too
  };
  float acc[Ranks / 8][4] = {};
  const int warp_line = threadIdx.x / 32 * 16;
#pragma unroll
  for (int step = 0; step < S::stages - 1; ++step) copy(step);
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait_group<S::stages - 2>();
    unsigned char* stage = shared + step % S::stages * S::stage_bytes;
    if (philox.threshold)
#pragma unroll
      for (int i = 0; i < S::a_panels; ++i)
        mask_tile<S::depth, row_chunks, threads, T>(stage + i * S::panel_bytes, philox, (first + step) * S::depth,
                                                    line0 + i * S::panel);
    __syncthreads();             // this step has come for all, and the last one is read to its end by all
    copy(step + S::stages - 1);  // over the last one
    multiply_tiles<T, Ranks>(acc, stage, warp_line);
  }
  ptx::cp_async_wait_group<0>();
  __syncthreads();  // the stages are free
  store_sums(reinterpret_cast<float*>(shared), S::sum_stride, warp_line, acc, p.keep_scale);
  __syncthreads();
}

template <class T, int Ranks>
__global__ void __launch_bounds__(threads) outer_kernel(const OuterParams p) {
  using S = Shape<T, Ranks>;
  extern __shared__ __align__(128) unsigned char shared[];
  const int line0 = blockIdx.x * tile_lines, rank0 = blockIdx.y * Ranks, R = padded(p.r);
  sum_tile<T, Ranks>(p, line0, rank0, shared);
  float* sums = reinterpret_cast<float*>(shared);
  const bool lines_first = p.out.row_stride == 1;  // neighbours in memory for neighbouring threads
  const auto each = [&](auto what) {
    for (int i = threadIdx.x; i < tile_lines * Ranks; i += threads) {
      const int line = lines_first ? i % tile_lines : i / Ranks, rank = lines_first ? i / tile_lines : i % Ranks;
      if (line0 + line < p.width && rank0 + rank < p.r)
        what(line0 + line, rank0 + rank, sums[line * S::sum_stride + rank]);
    }
  };
  const bool mine =
      add_splits(p.splits, blockIdx.z, blockIdx.x * gridDim.y + blockIdx.y, static_cast<int64_t>(p.width) * R,
                 [&](auto what) { each([&](int64_t line, int rank, float& value) { what(line * R + rank, value); }); });
  if (!mine) return;
  each([&](int64_t line, int rank, float value) {
    store(p.out.data, p.out.dtype, line * p.out.row_stride + rank * p.out.col_stride, value);
  });
}

}  // namespace

cudaError_t outer_launch(const OuterParams& p, cudaStream_t stream) {
  return by_dtype(p.dtype, [&](auto t) {
    return by_ranks(p.r, [&](auto ranks) {
      using T = decltype(t);
      constexpr int Ranks = decltype(ranks)::value;
      const dim3 grid(ceil_div(p.width, tile_lines), ceil_div(p.r, Ranks), p.splits.splits);
      return launch(outer_kernel<T, Ranks>, grid, threads, Shape<T, Ranks>::shared, p, stream);
    });
  });
}

}  // namespace svdkern::cuda
