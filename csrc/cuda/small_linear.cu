// out = a w + D*(z F^T) + bias for up to 32 rows, rounded once: w streams by, once; z is made here of small_shrink's
// sums, F is read as it is.
//
//   a (M, K) row-major, T    w (N, K) row-major, or (K, N) contracted down its rows    sums (slices, M, r)    F (N, r)
//
//           K, in steps of 128 bytes                 CTA: 64 columns of out, all rows, one split of K; its four warps
//         +----+----+----+----+----+----+            take steps in turn, each with two stages in shared memory of its
//      64 | w0 | w1 | w2 | w3 | w0 | .. |            own, so that nothing in the loop waits for another warp. Split 0
//         +----+----+----+----+----+----+  x  a      is the adapter's: 128 ranks at a time, h summed up and made z.
//
// Warps' sums meet in shared memory, splits' in splits.h, both in a fixed order. CTAs of the adapter come first in the
// grid, and what they wait for (the sums, F) passes beside the others' reads of w.
//
// Why tensor cores at one row: what limits is w, 19 bytes a clock and SM of an A100 at its top clock (2.04 TB/s, 108
// SMs, 1.0 to 1.4 GHz), 14 of an H100. 512 bytes are 16 x 16 elements of 16 bits, and 27 to 37 clocks. In them
//     mma        rows / 8 instructions, w's rows as m and a's as n: one is 2 clocks of an A100
//     fma        8 rows and as many conversions an SM of 128 lanes: 4 rows + 2 clocks, and the registers to hold f32
// so fma would do up to 4 rows and mma does all, in an eighth of the time. f32 has fma alone: a lane has two rows of w,
// reads a's by broadcast, 2 rows + 1 clocks for every 512 bytes: up to 16 rows go by unseen, 32 are as long as w takes.
//
// In flight: 4 warps, 8 KB of w each, one stage of two: 32 KB a CTA and two or three CTAs an SM, where bandwidth times
// latency (3 TB/s, 0.8 us, 132 SMs) is 18 KB. Every copy is 16 bytes, whole 128-byte lines of w, past the L1.
// Floor: one read of w; beside it a from the L2 for every 64 columns, M / 64 of w's
// bytes.
#include "epilogue.h"
#include "launch.h"
#include "product.h"
#include "splits.h"

namespace svdkern::cuda {
namespace {

constexpr int threads = 128, warps = threads / 32, stages = 2, columns = small_columns;
constexpr int ranks = 128;               // of the adapter at a time
constexpr int w_bytes = 64 * row_bytes;  // of a step: 64 rows of w, or two panels of 32 of f32 down its rows
constexpr int rank_stride = ranks + 16;  // of h; no bank conflicts where threads go along 16 ranks or 32
constexpr int sum_stride = columns + 4;  // no bank conflicts where warps write their sums

template <class T, int Rows>
struct Shape {
  static constexpr int a_bytes = Rows * row_bytes, stage_bytes = w_bytes + a_bytes, warp_bytes = stages * stage_bytes;
  static constexpr int panels = ranks / row_elements<T>, shared = warps * warp_bytes;
  static constexpr int slices = sizeof(T) == 2 ? 4 : 8;  // of a step: 16 k of 16 bits, 4 of f32
  static_assert(panels <= warps && panels * stage_bytes + Rows * rank_stride * sizeof(float) <= shared);
  static_assert(Rows * sum_stride * sizeof(float) <= warp_bytes);
};

// A warp's sums of 64 columns of out and all rows. 16 bits: of 16 columns and 8 rows as mma has them; f32: a lane has
// columns lane and lane + 32.
template <class T, int Rows>
struct Sums {
  float of[4][Rows / 8][4] = {};
};
template <int Rows>
struct Sums<float, Rows> {
  float of[2][Rows] = {};
};

// Starts to copy Rows rows of 128 bytes, from row0 and column0 on, by one warp; zeros outside.
template <int Rows, class T>
__device__ void copy_rows(unsigned char* tile, const Source<T>& from, int row0, int column0) {
  const int lane = threadIdx.x % 32, chunk = lane % row_chunks, column = column0 + chunk * per_chunk<T>;
  const int left = max(min(from.columns - column, per_chunk<T>), 0);
#pragma unroll
  for (int i = 0; i < Rows; i += 4) {
    const int row = i + lane / row_chunks, elements = row0 + row < from.rows ? left : 0;
    const T* at = from.data + (row0 + row) * from.stride + column;  // not looked at where nothing is left
    unsigned char* to = tile + chunk_offset(row, chunk);
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

// a's rows as b: one fragment for 16 of them, half of one for 8.
template <int Rows>
__device__ void load_rows(Fragment (&d)[ceil_div(Rows, 16)], const unsigned char* a, int chunk) {
  if constexpr (Rows == 8) {
    const int lane = threadIdx.x % 32;
    ptx::ldmatrix_x2(d[0][0], d[0][1], shared_address(a, lane % 8, chunk + lane / 8 % 2));
  } else {
#pragma unroll
    for (int j = 0; j < Rows / 16; ++j) load_b(d[j], a, 16 * j, chunk);
  }
}

// acc += w a^T at the first `slices` of a step: w's rows are columns of out, with Trans w's columns are.
template <class T, int Rows, bool Trans>
__device__ void multiply(Sums<T, Rows>& acc, const unsigned char* w, const unsigned char* a, int slices) {
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int k = 0; k < Shape<T, Rows>::slices; ++k) {
      if (k >= slices) break;
      Fragment left, right[ceil_div(Rows, 16)];
      load_rows<Rows>(right, a, 2 * k);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (Trans)
          load_a_trans(left, w, 16 * k, 2 * i);
        else
          load_a(left, w, 16 * i, 2 * k);
#pragma unroll
        for (int j = 0; j < Rows / 8; ++j)
          ptx::mma_m16n8k16(acc.of[i][j], left, right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1], T());
      }
    }
  } else {
    const int lane = threadIdx.x % 32;
#pragma unroll 2
    for (int k = 0; k < slices; ++k) {
      float4 left[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if constexpr (Trans) {
          const unsigned char* panel = w + i * w_bytes / 2;
          left[i] = make_float4(element(panel, 4 * k, lane), element(panel, 4 * k + 1, lane),
                                element(panel, 4 * k + 2, lane), element(panel, 4 * k + 3, lane));
        } else {
          left[i] = four(w, 32 * i + lane, k);
        }
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

// This CTA's piece of a w: `piece` of `pieces` along K.
template <class T, int Rows, bool Trans>
__device__ void add_base(Sums<T, Rows>& acc, const SmallLinearParams& p, int column0, int piece, int pieces,
                         unsigned char* shared) {
  using S = Shape<T, Rows>;
  constexpr int depth = row_elements<T>, panels = Trans && sizeof(T) == 4 ? 2 : 1;
  const Source<T> a(p.a, p.a_stride, p.rows, p.depth);
  const Source<T> w(p.w, p.w_stride, Trans ? p.depth : p.columns, Trans ? p.columns : p.depth);
  const int warp = threadIdx.x / 32, all = ceil_div(p.depth, depth), each = ceil_div(all, pieces);
  const int first = piece * each + warp, steps = ceil_div(min(each, all - piece * each) - warp, warps);
  unsigned char* ring = shared + warp * S::warp_bytes;
  const auto copy = [&](int step) {
    if (step < steps) {
      unsigned char* stage = ring + step % stages * S::stage_bytes;
      const int k = (first + step * warps) * depth;
      if constexpr (Trans) {
#pragma unroll
        for (int i = 0; i < panels; ++i)
          copy_rows<64 / panels>(stage + i * w_bytes / 2, w, k, column0 + i * columns / 2);
      } else {
        copy_rows<64>(stage, w, column0, k);
      }
      copy_rows<Rows>(stage + w_bytes, a, 0, k);
    }
    ptx::cp_async_commit_group();  // an empty one counts too
  };
#pragma unroll
  for (int step = 0; step < stages - 1; ++step) copy(step);
  for (int step = 0; step < steps; ++step) {
    __syncwarp();  // the last step is read to its end by all lanes
    copy(step + stages - 1);
    ptx::cp_async_wait_group<stages - 1>();
    __syncwarp();  // this step has come for all lanes
    const unsigned char* stage = ring + step % stages * S::stage_bytes;
    multiply<T, Rows, Trans>(acc, stage, stage + w_bytes, S::slices);
  }
}

// `count` ranks of 64 rows of F from rank0 on, in T, as panels of 128-byte rows; count is a multiple of 16.
template <class T>
__device__ void load_factor(unsigned char* tile, const Matrix& f, int row0, int rank0, int count) {
  const auto value = [&](int row, int rank) {
    const bool there = row0 + row < f.rows && rank0 + rank < f.cols;
    return there ? load(f.data, f.dtype, (row0 + row) * f.row_stride + (rank0 + rank) * f.col_stride) : 0.0f;
  };
  const auto place = [&](int row, int rank) {
    return tile + rank / row_elements<T> * w_bytes + chunk_offset(row, rank % row_elements<T> / per_chunk<T>) +
           rank % per_chunk<T> * sizeof(T);
  };
  if (f.row_stride == 1) {
    for (int i = threadIdx.x; i < columns * count / per_chunk<T>; i += threads) {
      const int row = i % columns, rank = i / columns * per_chunk<T>;
      Chunk<T> chunk;
#pragma unroll
      for (int e = 0; e < per_chunk<T>; ++e) chunk.element[e] = rounded<T>(value(row, rank + e));
      *reinterpret_cast<uint4*>(place(row, rank)) = chunk.bits;
    }
    return;
  }
  for (int rank = threadIdx.x % 32; rank < count; rank += 32)
#pragma unroll 8
    for (int row = threadIdx.x / 32; row < columns; row += warps)
      *reinterpret_cast<T*>(place(row, rank)) = rounded<T>(value(row, rank));
}

// z F^T, a warp for each panel of ranks; h and z go out once.
template <class T, int Rows>
__device__ void add_adapter(Sums<T, Rows>& acc, const SmallLinearParams& p, int column0, unsigned char* shared) {
  using S = Shape<T, Rows>;
  unsigned char *factor = shared, *z = shared + S::panels * w_bytes;
  float* h = reinterpret_cast<float*>(z + S::panels * S::a_bytes);
  const int warp = threadIdx.x / 32, R = padded(p.r);
  const int64_t apart = static_cast<int64_t>(p.rows) * p.r;
  const float scale = load(p.by.scale);
  for (int rank0 = 0; rank0 < R; rank0 += ranks) {
    const int count = min(ranks, R - rank0);
    __syncthreads();  // the tiles of the ranks before are read to their end
    load_factor<T>(factor, p.factor, column0, rank0, count);
    for (int i = threadIdx.x; i < p.rows * count; i += threads) {
      const int row = i / count, rank = rank0 + i % count;
      const float* at = p.sums + row * static_cast<int64_t>(p.r) + rank;
      float sum = 0.0f;
      if (rank < p.r) {
#pragma unroll 8
        for (int slice = 0; slice < p.slices; ++slice) sum += at[slice * apart];
        if (p.h && blockIdx.x == 0) p.h[row * static_cast<int64_t>(p.r) + rank] = sum;
      }
      h[row * rank_stride + rank - rank0] = sum;
    }
    __syncthreads();
    for (int row = warp; row < Rows; row += warps)
      for (int i = threadIdx.x % 32; i < count; i += 32) {
        const int rank = rank0 + i;
        const bool there = row < p.rows && rank < p.r;
        const T value =
            rounded<T>(there ? modulated(p.by, h + row * rank_stride - rank0, row, rank, p.r, scale) : 0.0f);
        *reinterpret_cast<T*>(z + i / row_elements<T> * S::a_bytes +
                              chunk_offset(row, i % row_elements<T> / per_chunk<T>) + i % per_chunk<T> * sizeof(T)) =
            value;
        if (p.z && blockIdx.x == 0 && row < p.rows) static_cast<T*>(p.z)[row * static_cast<int64_t>(R) + rank] = value;
      }
    __syncthreads();
    const int mine = (count - warp * row_elements<T>)*S::slices / row_elements<T>;
    if (mine > 0) multiply<T, Rows, false>(acc, factor + warp * w_bytes, z + warp * S::a_bytes, min(mine, S::slices));
  }
}

// A warp's sums as rows of out.
template <class T, int Rows>
__device__ void store_rows(float* sums, const Sums<T, Rows>& acc) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < Rows / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          sums[(8 * j + 2 * t + e % 2) * sum_stride + 16 * i + g + e / 2 * 8] = acc.of[i][j][e];
  } else {
#pragma unroll
    for (int row = 0; row < Rows; ++row)
#pragma unroll
      for (int i = 0; i < 2; ++i) sums[row * sum_stride + 32 * i + lane] = acc.of[i][row];
  }
}

template <class T, int Rows, bool Trans>
__global__ void __launch_bounds__(threads, 1) small_linear_kernel(const SmallLinearParams p) {
  using S = Shape<T, Rows>;
  extern __shared__ __align__(128) unsigned char shared[];
  const int column0 = blockIdx.x * columns, adapter = p.sums != nullptr, split = blockIdx.y;
  Sums<T, Rows> acc;
  if (split < adapter)
    add_adapter<T, Rows>(acc, p, column0, shared);
  else if (p.w)
    add_base<T, Rows, Trans>(acc, p, column0, split - adapter, p.splits.splits - adapter, shared);
  ptx::cp_async_wait_group<0>();
  __syncthreads();  // the stages are free
  store_rows<T, Rows>(reinterpret_cast<float*>(shared + threadIdx.x / 32 * S::warp_bytes), acc);
  __syncthreads();

  float* sums = reinterpret_cast<float*>(shared);
  const auto each = [&](auto what) {
    for (int i = threadIdx.x; i < p.rows * columns; i += threads) {
      const int row = i / columns, column = i % columns;
      if (column0 + column < p.columns) what(row, column0 + column, sums[row * sum_stride + column]);
    }
  };
  const Philox philox(p.keep);
  each([&](int row, int column, float& value) {
    const float* of_warp = &value;
#pragma unroll
    for (int warp = 1; warp < warps; ++warp) value += of_warp[warp * S::warp_bytes / sizeof(float)];
    if (split < adapter && philox.threshold) {
      const uint4 b = philox.bits(row, column / 8);
      const uint32_t words[4] = {b.x, b.y, b.z, b.w}, word = Philox::pick(words, column % 8 / 2);
      value = (column % 2 ? word >> 16 : word & 0xffffu) >= philox.threshold ? value * p.keep_scale : 0.0f;
    }
  });
  const bool mine = add_splits(p.splits, split, blockIdx.x, static_cast<int64_t>(p.rows) * p.columns, [&](auto what) {
    each([&](int64_t row, int column, float& value) { what(row * p.columns + column, value); });
  });
  if (!mine) return;
  const T* bias = static_cast<const T*>(p.bias);
  each([&](int64_t row, int column, float value) {
    const float b = bias ? static_cast<float>(bias[column]) : 0.0f;
    static_cast<T*>(p.out)[row * p.out_stride + column] = rounded<T>(value + b);
  });
}

template <class T, int Rows>
cudaError_t launch_as(const SmallLinearParams& p, cudaStream_t stream) {
  const auto kernel = p.w_trans ? small_linear_kernel<T, Rows, true> : small_linear_kernel<T, Rows, false>;
  const dim3 grid(ceil_div(p.columns, columns), p.splits.splits);
  return launch(kernel, grid, threads, Shape<T, Rows>::shared, p, stream);
}

}  // namespace

cudaError_t small_linear_launch(const SmallLinearParams& p, cudaStream_t stream) {
  return by_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    if (p.rows <= 8) return launch_as<T, 8>(p, stream);
    if (p.rows <= 16) return launch_as<T, 16>(p, stream);
    return launch_as<T, small_rows>(p, stream);
  });
}

}  // namespace svdkern::cuda
