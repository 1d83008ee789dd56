// out = a w + D*(z F^T) + bias for up to 32 rows, rounded once: w streams by, once; z is made here of small_shrink's
// sums, F is read as it is.
//
//   a (M, K) row-major, T    w (N, K) row-major, or (K, N) contracted down its rows    sums (slices, M, r)    F (N, r)
//
//           K, in steps of 128 bytes              CTA: 32 columns of out, all rows, one split of K; four warps take
//         +----+----+----+----+----+----+         steps in turn, each with two to four stages in shared memory of its
//      32 | w0 | w1 | w2 | w3 | w0 | .. |         own, so that nothing in the loop waits for another warp. Four more
//         +----+----+----+----+----+----+  x  a   are the adapter's: 128 ranks at a time, h summed up and made z, in
//                                                 the CTAs of the first split.
//
// Warps' sums meet in shared memory, splits' in splits.h, both in a fixed order. What the adapter waits for (the sums,
// F) passes beside the reads of w. K is split only where columns are too few to give every processor a CTA: the last
// split waits for the others' sums, a store and a read that nothing hides.
//
// Why tensor cores at one row: what limits is w, 19 bytes a clock and SM of an A100 at its top clock (2.04 TB/s, 108
// SMs, 1.0 to 1.4 GHz), 14 of an H100. 512 bytes are 16 x 16 elements of 16 bits, and 27 to 37 clocks. In them
//     mma        rows / 8 instructions, w's rows as m and a's as n: one is 2 clocks of an A100
//     fma        8 rows and as many conversions an SM of 128 lanes: 4 rows + 2 clocks, and the registers to hold f32
// so fma would do up to 4 rows and mma does all, in an eighth of the time. f32 has fma alone: a lane has two rows of w,
// reads a's by broadcast, 2 rows + 1 clocks for every 512 bytes: up to 16 rows go by unseen, 32 are as long as w takes.
//
// Instructions: 4 KB of w are a step of a warp; an H100 brings them in 290 clocks, so each of four warps has 1170 for a
// step. Of 16 bits it is 95 to 102 instructions up to 8 rows, 125 to 131 up to 16, 179 to 195 above: where a lane's
// copies come from is known before the loop (LaneCopies).
//
// In flight: 4 warps, 4 KB of w each and all stages while a warp waits: 64 KB a CTA up to 8 rows, 48 up to 16, 32
// above, or 64 where a CTA has a processor's memory for itself; where bandwidth times latency (3 TB/s, 0.8 us, 132 SMs)
// is 18 KB. Every copy is 16 bytes, past the L1, whole lines of w or, down the rows of 16 bits, halves of which the L2
// fetches the other too. Floor: one read of w; beside it a from the L2 for every 32 columns, M / 32 of w's bytes.
#include "epilogue.h"
#include "launch.h"
#include "ptx/barrier.h"
#include "small_tile.h"
#include "splits.h"

namespace svdkern::cuda {
namespace {

using namespace few;

// This CTA's piece of a w, `piece` of `pieces` along K, by its first warps.
template <class T, int Rows, bool Trans, class S>
__device__ __forceinline__ void add_base(Sums<T, Rows>& acc, const SmallLinearParams& p, int column0, int piece,
                                         int pieces, unsigned char* ring) {
  constexpr int depth = row_elements<T>, chunks = Trans ? columns / per_chunk<T> : row_chunks;
  constexpr int w_rows = Trans ? depth : columns;
  const Source<T> a(p.a, p.a_stride, p.rows, p.depth);
  const Source<T> w(p.w, p.w_stride, Trans ? p.depth : p.columns, Trans ? p.columns : p.depth);
  const int warp = threadIdx.x / 32, all = ceil_div(p.depth, depth), each = ceil_div(all, pieces);
  const int first = piece * each + warp, steps = ceil_div(min(each, all - piece * each) - warp, warps);
  const bool whole_chunks = a.aligned && w.aligned && (!Trans || p.columns % per_chunk<T> == 0);
  // Steps of which all copies are whole.
  const int whole = whole_chunks ? min(steps, ceil_div(p.depth / depth - first, warps)) : 0;
  const int64_t apart = static_cast<int64_t>(warps) * depth;  // of a warp's steps, along K

  const int k0 = first * depth;
  LaneCopies<T, Rows, row_chunks> of_a(a, 0, p.rows - 1, k0, p.depth);
  LaneCopies<T, w_rows, chunks> of_w(w, Trans ? k0 : column0, Trans ? p.depth : p.columns - 1, Trans ? column0 : k0,
                                     Trans ? p.columns - per_chunk<T> : p.depth);
  const int64_t w_apart = Trans ? apart * p.w_stride : apart;
  int copied = 0, to = 0;  // steps, and the stage of the next
  const uint32_t ring_at = kept(as_shared(ring));
  const auto copy = [&] {
    if (copied < whole) {
      of_w.copy(ring_at + to);
      of_a.copy(ring_at + to + w_bytes, p.rows);
      of_w.go_on(w_apart), of_a.go_on(apart);
    } else if (copied < steps) {
      const int k = (first + copied * warps) * depth;
      copy_rows<w_rows, chunks>(ring + to, w, Trans ? k : column0, Trans ? column0 : k);
      copy_rows<Rows, row_chunks>(ring + to + w_bytes, a, 0, k);
    }
    ptx::cp_async_commit_group();  // an empty one counts too
    ++copied;
    to = to + S::stage_bytes == S::warp_bytes ? 0 : to + S::stage_bytes;
  };
  // Rows past the last of a stay zeros.
  for (int stage = 0; stage < S::stages; ++stage)
    for (int row = threadIdx.x % 32 / row_chunks; row < Rows; row += 32 / row_chunks)
      if (row >= p.rows)
        *reinterpret_cast<uint4*>(ring + stage * S::stage_bytes + w_bytes +
                                  chunk_offset(row, threadIdx.x % row_chunks)) = make_uint4(0, 0, 0, 0);
  const Lanes<Rows, Trans> lanes;
  int at = 0;
#pragma unroll 1
  for (int step = 1 - S::stages; step < steps; ++step) {
    __syncwarp();  // the last step is read to its end by all lanes
    copy();
    if (step < 0) continue;  // the pipeline fills
    ptx::cp_async_wait_group<S::stages - 1>();
    __syncwarp();  // this step has come for all lanes
    const unsigned char* stage = ring + at;
    multiply<T, Rows, Trans>(acc, lanes, stage, stage + w_bytes, S::slices);
    at = at + S::stage_bytes == S::warp_bytes ? 0 : at + S::stage_bytes;
  }
}

// `count` ranks of 32 rows of F from rank0 on, in T, as panels of 128-byte rows; count is a multiple of 16.
template <class T>
__device__ void load_factor(unsigned char* tile, const Matrix& f, int row0, int rank0, int count, int thread) {
  const auto place = [&](int row, int rank) {
    return tile + rank / row_elements<T> * w_bytes + chunk_offset(row, rank % row_elements<T> / per_chunk<T>) +
           rank % per_chunk<T> * sizeof(T);
  };
  as_elements(f.data, f.dtype, [&](const auto* data) {
    const auto* first = data + row0 * f.row_stride + rank0 * f.col_stride;
    const auto value = [&](int row, int rank) {
      const bool there = row0 + row < f.rows && rank0 + rank < f.cols;
      return there ? static_cast<float>(first[row * f.row_stride + rank * f.col_stride]) : 0.0f;
    };
    if (f.row_stride == 1) {
      for (int i = thread; i < columns * count / per_chunk<T>; i += warps * 32) {
        const int row = i % columns, rank = i / columns * per_chunk<T>;
        Chunk<T> chunk;
#pragma unroll
        for (int e = 0; e < per_chunk<T>; ++e) chunk.element[e] = rounded<T>(value(row, rank + e));
        *reinterpret_cast<uint4*>(place(row, rank)) = chunk.bits;
      }
    } else {
      for (int rank = thread % 32; rank < count; rank += 32)
#pragma unroll
        for (int row = thread / 32; row < columns; row += warps)
          *reinterpret_cast<T*>(place(row, rank)) = rounded<T>(value(row, rank));
    }
  });
}

// z F^T by the CTA's other warps, a warp for each panel of ranks; h and z go out once.
template <class T, int Rows, class S>
__device__ __forceinline__ void add_adapter(Sums<T, Rows>& acc, const SmallLinearParams& p, int column0,
                                            unsigned char* shared) {
  constexpr int barrier = 1, group = warps * 32;
  unsigned char *factor = shared, *z = shared + S::factor_bytes;
  float* h = reinterpret_cast<float*>(shared);
  const int thread = threadIdx.x - group, warp = thread / 32, R = padded(p.r);
  const int64_t apart = static_cast<int64_t>(p.rows) * p.r;
  const float scale = load(p.by.scale);
  const Lanes<Rows, false> lanes;
#pragma unroll 1
  for (int rank0 = 0; rank0 < R; rank0 += ranks) {
    const int count = min(ranks, R - rank0);
    ptx::bar_sync(barrier, group);  // the tiles of the ranks before are read to their end
    constexpr int together = 2;     // numbers of h, whose parts are on their way at once
    for (int first = thread; first < p.rows * count; first += together * group) {
      const auto each = [&](auto what) {
#pragma unroll
        for (int e = 0; e < together; ++e) {
          const int i = first + e * group, row = i / count, rank = rank0 + i % count;
          if (i < p.rows * count) what(e, row, rank, row * static_cast<int64_t>(p.r) + rank);
        }
      };
      const float* at[together] = {};
      float sum[together] = {};
      each([&](int e, int, int rank, int64_t place) { at[e] = rank < p.r ? p.sums + place : nullptr; });
#pragma unroll 8
      for (int slice = 0; slice < p.slices; ++slice)
#pragma unroll
        for (int e = 0; e < together; ++e)
          if (at[e]) sum[e] += at[e][slice * apart];
      each([&](int e, int row, int rank, int64_t place) {
        h[row * rank_stride + rank - rank0] = sum[e];
        if (p.h && blockIdx.x == 0 && rank < p.r) p.h[place] = sum[e];
      });
    }
    ptx::bar_sync(barrier, group);  // h is there
    for (int row = warp; row < Rows; row += warps)
      for (int i = thread % 32; i < count; i += 32) {
        const int rank = rank0 + i;
        const bool there = row < p.rows && rank < p.r;
        const T value =
            rounded<T>(there ? modulated(p.by, h + row * rank_stride - rank0, row, rank, p.r, scale) : 0.0f);
        *reinterpret_cast<T*>(z + i / row_elements<T> * S::a_bytes +
                              chunk_offset(row, i % row_elements<T> / per_chunk<T>) + i % per_chunk<T> * sizeof(T)) =
            value;
        if (p.z && blockIdx.x == 0 && row < p.rows) static_cast<T*>(p.z)[row * static_cast<int64_t>(R) + rank] = value;
      }
    ptx::bar_sync(barrier, group);  // h is read to its end, where F comes to
    load_factor<T>(factor, p.factor, column0, rank0, count, thread);
    ptx::bar_sync(barrier, group);  // z and F are there
    const int mine = (count - warp * row_elements<T>)*S::slices / row_elements<T>;
    if (mine > 0)
      multiply<T, Rows, false>(acc, lanes, factor + warp * w_bytes, z + warp * S::a_bytes, min(mine, S::slices));
  }
}

// A warp's sums as rows of out.
template <class T, int Rows>
__device__ void store_rows(float* sums, const Sums<T, Rows>& acc) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < Rows / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          sums[(8 * j + 2 * t + e % 2) * sum_stride + 16 * i + g + e / 2 * 8] = acc.of[i][j][e];
  } else {
#pragma unroll
    for (int row = 0; row < Rows; ++row) {  // a lane's other column is added up by the lane that has the other k
      const bool second = lane >= 16;
      const float mine = second ? acc.of[1][row] : acc.of[0][row], other = second ? acc.of[0][row] : acc.of[1][row];
      sums[row * sum_stride + lane] = mine + __shfl_xor_sync(~0u, other, 16);
    }
  }
}

template <class T, int Rows, bool Trans, bool Large>
__global__ void __launch_bounds__(threads, sizeof(T) == 2 && !Large ? 2 : 1)
    small_linear_kernel(const SmallLinearParams p) {
  using S = Shape<T, Rows, Large>;
  extern __shared__ __align__(128) unsigned char shared[];
  const int column0 = blockIdx.x * columns, split = blockIdx.y, warp = threadIdx.x / 32;
  const bool adapter = p.sums && split == 0;
  const int lane_column = column0 + threadIdx.x % columns;  // of all elements of out that this thread stores
  const T* bias = static_cast<const T*>(p.bias);
  const float b = bias && lane_column < p.columns ? static_cast<float>(bias[lane_column]) : 0.0f;
  unsigned char* of_adapter = shared + warps * S::warp_bytes;
  Sums<T, Rows> acc;
  if (warp >= warps) {
    if (adapter) add_adapter<T, Rows, S>(acc, p, column0, of_adapter);
  } else if (p.w) {
    add_base<T, Rows, Trans, S>(acc, p, column0, split, p.splits.splits, shared + warp * S::warp_bytes);
  }
  ptx::cp_async_wait_group<0>();
  __syncthreads();  // the stages are free
  unsigned char* mine = warp < warps ? shared + warp * S::warp_bytes : of_adapter + (warp - warps) * S::sum_bytes;
  store_rows<T, Rows>(reinterpret_cast<float*>(mine), acc);
  __syncthreads();

  float* sums = reinterpret_cast<float*>(shared);
  const auto each = [&](auto what) {
    if (lane_column < p.columns)
      for (int row = threadIdx.x / columns; row < p.rows; row += threads / columns)
        what(row, lane_column, sums[row * sum_stride + threadIdx.x % columns]);
  };
  const Philox philox(p.keep);
  each([&](int row, int column, float& value) {
    const float* of_warp = &value;
#pragma unroll
    for (int i = 1; i < warps; ++i) value += of_warp[i * S::warp_bytes / sizeof(float)];
    if (!adapter) return;
    float branch = 0.0f;
#pragma unroll
    for (int i = 0; i < S::panels; ++i) branch += of_warp[(warps * S::warp_bytes + i * S::sum_bytes) / sizeof(float)];
    if (philox.threshold) {
      const uint4 bits = philox.bits(row, column / 8);
      const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w}, word = Philox::pick(words, column % 8 / 2);
      branch = (column % 2 ? word >> 16 : word & 0xffffu) >= philox.threshold ? branch * p.keep_scale : 0.0f;
    }
    value += branch;
  });
  const bool last = add_splits(p.splits, split, blockIdx.x, static_cast<int64_t>(p.rows) * p.columns, [&](auto what) {
    each([&](int64_t row, int column, float& value) { what(row * p.columns + column, value); });
  });
  if (!last) return;
  each([&](int64_t row, int column, float value) {
    static_cast<T*>(p.out)[row * p.out_stride + column] = rounded<T>(value + b);
  });
}

template <class T, int Rows, bool Large = false>
cudaError_t launch_as(const SmallLinearParams& p, cudaStream_t stream) {
  const auto kernel =
      p.w_trans ? small_linear_kernel<T, Rows, true, Large> : small_linear_kernel<T, Rows, false, Large>;
  const dim3 grid(ceil_div(p.columns, columns), p.splits.splits);
  return launch(kernel, grid, threads, Shape<T, Rows, Large>::shared, p, stream);
}

}  // namespace

cudaError_t small_linear_launch(const SmallLinearParams& p, cudaStream_t stream) {
  return by_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    if (p.rows <= 8) return launch_as<T, 8>(p, stream);
    if (p.rows <= 16) return launch_as<T, 16>(p, stream);
    const DeviceLimits of = device_limits();
    const int64_t ctas = static_cast<int64_t>(ceil_div(p.columns, columns)) * p.splits.splits;
    const bool large = ctas <= of.processors && of.shared > large_shared;
    if (large) return launch_as<T, small_rows, true>(p, stream);
    return launch_as<T, small_rows>(p, stream);
  });
}

}  // namespace svdkern::cuda
