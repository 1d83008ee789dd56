// A tile of out = a w + D*(z F^T) + bias: the frozen product, and the adapter as more steps of the same pipeline.
//
// clang-format off
//          K, in steps of 128 bytes          R
//        +----+----+----+----+----+----+  +----+
//     BM | s0 | s1 | s2 | .. |    |    |  | z  |    CTA: BM x BN of out; a warp has 64 x 64 of it where that is 128 or
//        +----+----+----+----+----+----+  +----+    more wide, of the smaller one 32 x 32.
//          x  the same steps of w           F
//
//     shared memory   | s2 |  s3 |  s4 |            cp.async brings step + stages - 1 while step is multiplied
//     registers         slice k | slice k + 1       ldmatrix brings the next 16 of k while this one is multiplied
// clang-format on
//
// (z, F) is one step for every 128 bytes of ranks; it has as many products as R has slices. With dropout the adapter's
// steps come first, and the sums are masked between them and the first step of K.
//
// What a step of 128 x 256 costs a processor, by count: 1024 mma, 1680 clocks of an H100 and 2048 of an A100; 1408
// wavefronts of shared memory, 1024 of them ldmatrix; 338 instructions a warp, 128 of them mma. So the tensor cores
// are what it waits for. Warps of 64 x 32 would read half as much again.
#pragma once

#include <type_traits>

#include "flags.h"
#include "product.h"

namespace svdkern::cuda {

template <class T, int Rows, int Columns>
struct LinearShape {
  static constexpr int BM = Rows, BN = Columns;
  static constexpr bool wide = BM >= 128;  // takes operands with rows of whole 16 bytes alone
  static constexpr int stages = BM == 64 && sizeof(T) == 2 ? 4 : 3;
  static constexpr int warp_rows = wide ? 64 : 32, warp_columns = warp_rows;
  static constexpr int column_warps = BN / warp_columns, threads = BM / warp_rows * column_warps * 32;
  static constexpr int ctas = wide && BN == 128 ? 2 : 1;  // of a processor, at least
  static constexpr int depth = row_elements<T>, panel = row_elements<T>, panels = BN / panel;
  static constexpr int panel_bytes = depth * row_bytes;  // of w contracted down its rows
  static constexpr int a_bytes = BM * row_bytes, stage_bytes = a_bytes + BN * row_bytes, shared = stages * stage_bytes;
  static constexpr int row_blocks = warp_rows / 16, column_blocks = warp_columns / 8;
  static constexpr int slices = sizeof(T) == 2 ? 4 : 8, slice = depth / slices;  // of k in a step
  static constexpr int out_stride = BN + per_chunk<T>;  // elements; no bank conflicts where warps write theirs
  static_assert(BM * out_stride * sizeof(T) <= shared);
};

template <class S>
using Sums = float[S::row_blocks][S::column_blocks][4];

// A tile's place in out, and this warp's in the tile.
template <class S>
struct TilePlace {
  int row0, column0, warp_row, warp_column;

  __device__ TilePlace(int row0, int column0)
      : row0(row0),
        column0(column0),
        warp_row(static_cast<int>(threadIdx.x) / 32 / S::column_warps * S::warp_rows),
        warp_column(static_cast<int>(threadIdx.x) / 32 % S::column_warps * S::warp_columns) {}
};

// --------------------------------------------------------------------------------------------------------- copies

// What is copied at which step: first ... first + base - 1 are those of K, the others the adapter's. Masked: there may
// be dropout.
template <class T, class S, bool Down, bool Masked>
struct LinearCopies {
  Source<T> a, w, z, f;
  int R, first, base, steps, row0, column0;
  unsigned char* shared;

  __device__ LinearCopies(const LinearParams& p, int row0, int column0, unsigned char* shared)
      : a(p.a, p.a_stride, p.rows, p.w ? p.depth : 0),
        w(p.w, p.w_stride, Down ? a.columns : p.columns, Down ? p.columns : a.columns),
        z(p.z, p.z ? padded(p.r) : 0, p.rows, p.z ? padded(p.r) : 0),
        f(p.factor, z.columns, p.columns, z.columns),
        R(z.columns),
        first(Masked && p.keep.threshold ? ceil_div(R, S::depth) : 0),
        base(ceil_div(a.columns, S::depth)),
        steps(base + ceil_div(R, S::depth)),
        row0(row0),
        column0(column0),
        shared(shared) {}

  __device__ unsigned char* stage(int step) const { return shared + step % S::stages * S::stage_bytes; }

  // The first rank of an adapter's step.
  __device__ int rank(int step) const { return (step < first ? step : step - base) * S::depth; }

  template <int Part = 0, int Parts = 1>
  __device__ void of_base(int step) const {
    const int k = (step - first) * S::depth;
    unsigned char* to = stage(step);
    copy_tile<S::BM, row_chunks, S::threads, S::wide, Part, Parts>(to, a, row0, k);
    to += S::a_bytes;
    if constexpr (!Down) {
      copy_tile<S::BN, row_chunks, S::threads, S::wide, Part, Parts>(to, w, column0, k);
    } else {
      constexpr bool whole = S::panels % Parts == 0;  // panels to a part, or parts of all of them
      constexpr int each = whole ? S::panels / Parts : S::panels;
#pragma unroll
      for (int i = whole ? each * Part : 0; i < (whole ? each * (Part + 1) : each); ++i)
        copy_tile<S::depth, row_chunks, S::threads, S::wide, whole ? 0 : Part, whole ? 1 : Parts>(
            to + i * S::panel_bytes, w, k, column0 + i * S::panel);
    }
  }

  __device__ void of_any(int step) const {
    if (step >= first && step < first + base) {
      of_base(step);
    } else if (step < steps) {
      copy_tile<S::BM, row_chunks, S::threads, S::wide>(stage(step), z, row0, rank(step));
      copy_tile<S::BN, row_chunks, S::threads, S::wide>(stage(step) + S::a_bytes, f, column0, rank(step));
    }
  }
};

// ------------------------------------------------------------------------------------------------------- products

// A warp's fragments of one slice of k.
template <class S>
struct Slice {
  Fragment a[S::row_blocks], w[S::column_blocks / 2];
};

// Where a lane reads them. Of slice k: at these addresses ^ 32 k, since a row's chunks are permuted by exclusive or;
// down the rows of w: 16 rows further, and two chunks on at the address ^ 32.
template <class S>
struct Lanes {
  uint32_t a, w, w_down;  // in the first stage

  __device__ Lanes(const unsigned char* shared, int row, int column) {
    const int lane = threadIdx.x % 32;
    const unsigned char* w_tile = shared + S::a_bytes;
    a = shared_address(shared, row + lane % 16, lane / 16);
    w = shared_address(w_tile, column + lane % 8 + lane / 16 * 8, lane / 8 % 2);
    w_down = shared_address(w_tile + column / S::panel * S::panel_bytes, lane % 16, column % S::panel / 8 + lane / 16);
  }

  template <bool Down>
  __device__ void load(Slice<S>& slice, uint32_t stage, int k) const {
#pragma unroll
    for (int i = 0; i < S::row_blocks; ++i) ptx::ldmatrix_x4(slice.a[i], ((a + stage) ^ (k << 5)) + i * 16 * row_bytes);
#pragma unroll
    for (int j = 0; j < S::column_blocks / 2; ++j)
      if constexpr (Down)
        ptx::ldmatrix_x4_trans(slice.w[j], ((w_down + stage) ^ (j << 5)) + k * 16 * row_bytes);
      else
        ptx::ldmatrix_x4(slice.w[j], ((w + stage) ^ (k << 5)) + j * 16 * row_bytes);
  }
};

template <class T, class S>
__device__ inline void multiply_slice(Sums<S>& acc, const Slice<S>& slice) {
#pragma unroll
  for (int i = 0; i < S::row_blocks; ++i)
#pragma unroll
    for (int j = 0; j < S::column_blocks / 2; ++j)
      multiply_pair<T>(acc[i][2 * j], acc[i][2 * j + 1], slice.a[i], slice.w[j]);
}

// acc += a w of one step in float32; w's rows are columns of out unless Down.
template <class S, bool Down>
__device__ void multiply_step_f32(Sums<S>& acc, const unsigned char* stage, int row, int column, int slices) {
  const unsigned char* w = stage + S::a_bytes;
  if constexpr (!Down) {
#pragma unroll 1
    for (int k = 0; k < slices; ++k)
#pragma unroll
      for (int i = 0; i < S::row_blocks; ++i) multiply_f32(acc[i], stage, row + 16 * i, w, column, k);
  } else {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const unsigned char* right = w + column / S::panel * S::panel_bytes;
#pragma unroll 4
    for (int k = 0; k < S::depth; ++k)
#pragma unroll
      for (int i = 0; i < S::row_blocks; ++i) {
        const float upper = element(stage, row + 16 * i + g, k), lower = element(stage, row + 16 * i + g + 8, k);
#pragma unroll
        for (int j = 0; j < S::column_blocks; ++j) {
          const float2 two = *reinterpret_cast<const float2*>(&element(right, k, column % S::panel + 8 * j + 2 * t));
          acc[i][j][0] = fmaf(upper, two.x, acc[i][j][0]), acc[i][j][1] = fmaf(upper, two.y, acc[i][j][1]);
          acc[i][j][2] = fmaf(lower, two.x, acc[i][j][2]), acc[i][j][3] = fmaf(lower, two.y, acc[i][j][3]);
        }
      }
  }
}

// ------------------------------------------------------------------------------------------------------- the loop

// Steps of K in 16 bits: from ... to - 1, while later ones of K are copied. The thread that looks at z's counter does
// so in the last of them; the next step's barrier tells the others.
template <class T, class S, bool Down, bool Masked>
__device__ inline void multiply_base(Sums<S>& acc, const Lanes<S>& lanes,
                                     const LinearCopies<T, S, Down, Masked>& copies, int from, int to,
                                     const Awaited& awaited) {
  Slice<S> slices[2];
  ptx::cp_async_wait_group<S::stages - 2>();
  __syncthreads();  // the first step has come for all
  lanes.template load<Down>(slices[0], from % S::stages * S::stage_bytes, 0);
#pragma unroll 1
  for (int step = from; step < to; ++step) {
    if (step == to - 1) awaited.look();
    const auto each = [&](auto constant) {
      constexpr int k = decltype(constant)::value;
      if constexpr (k + 1 < S::slices) {
        lanes.template load<Down>(slices[(k + 1) % 2], step % S::stages * S::stage_bytes, k + 1);
      } else if (step + 1 < to) {
        ptx::cp_async_wait_group<S::stages - 3>();  // the next step's; the copies on their way are not committed
        __syncthreads();                            // it has come for all, and this step is read to its end by all
        lanes.template load<Down>(slices[0], (step + 1) % S::stages * S::stage_bytes, 0);
      }
      copies.template of_base<k, S::slices>(step + S::stages - 1);  // over the last step
      multiply_slice<T, S>(acc, slices[k % 2]);
    };
    each(std::integral_constant<int, 0>()), each(std::integral_constant<int, 1>());
    each(std::integral_constant<int, 2>()), each(std::integral_constant<int, 3>());
    ptx::cp_async_commit_group();
  }
}

// Steps from ... to - 1 of any kind, one slice after another: the adapter's, K's last, and all in float32.
template <class T, class S, bool Down, bool Masked>
__device__ inline void multiply_any(Sums<S>& acc, const Lanes<S>& lanes, const LinearCopies<T, S, Down, Masked>& copies,
                                    int from, int to, const TilePlace<S>& at) {
#pragma unroll 1
  for (int step = from; step < to; ++step) {
    ptx::cp_async_wait_group<S::stages - 2>();
    __syncthreads();                      // this step has come for all, and the last one is read to its end by all
    copies.of_any(step + S::stages - 1);  // over the last one
    ptx::cp_async_commit_group();         // an empty one counts too
    const bool of_base = step >= copies.first && step < copies.first + copies.base;
    const int slices = of_base ? S::slices : min(S::slices, (copies.R - copies.rank(step)) / S::slice);
    if constexpr (sizeof(T) == 2) {
#pragma unroll 1
      for (int k = 0; k < slices; ++k) {
        Slice<S> slice;
        if (Down && of_base)
          lanes.template load<Down>(slice, step % S::stages * S::stage_bytes, k);
        else
          lanes.template load<false>(slice, step % S::stages * S::stage_bytes, k);
        multiply_slice<T, S>(acc, slice);
      }
    } else if (of_base) {
      multiply_step_f32<S, Down>(acc, copies.stage(step), at.warp_row, at.warp_column, slices);
    } else {
      multiply_step_f32<S, false>(acc, copies.stage(step), at.warp_row, at.warp_column, slices);
    }
  }
}

// D times the sums of the adapter.
template <class S>
__device__ void mask_sums(Sums<S>& acc, const Philox& philox, int row, int column, float keep_scale) {
  const int g = threadIdx.x % 32 / 4;
#pragma unroll
  for (int i = 0; i < S::row_blocks; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int j0 = 0; j0 < S::column_blocks; j0 += 4) {
        uint32_t words[4];
        philox.words_of_sums(words, row + 16 * i + 8 * half + g, column / 8 + j0);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float &even = acc[i][j0 + j][2 * half], &odd = acc[i][j0 + j][2 * half + 1];
          even = (words[j] & 0xffffu) >= philox.threshold ? even * keep_scale : 0.0f;
          odd = (words[j] >> 16) >= philox.threshold ? odd * keep_scale : 0.0f;
        }
      }
}

// acc = a w + D*(z F^T) of a tile. z is read once `awaited` says so.
template <class T, class S, bool Down, bool Masked>
__device__ inline void sum_tile(Sums<S>& acc, const LinearParams& p, const TilePlace<S>& at, unsigned char* shared,
                                const Awaited& awaited) {
  const LinearCopies<T, S, Down, Masked> copies(p, at.row0, at.column0, shared);
  const Lanes<S> lanes(shared, at.warp_row, at.warp_column);
  const int steady = sizeof(T) == 2 ? copies.first + copies.base - (S::stages - 1) : 0;
  const bool early = copies.first > 0 || steady <= 0;  // the adapter's copies begin before the first step
  if (early && awaited.counter) {
    awaited.look();
    __syncthreads();  // one thread looked
  }
#pragma unroll
  for (int step = 0; step < S::stages - 1; ++step) {
    copies.of_any(step);
    ptx::cp_async_commit_group();
  }
  if (Masked && copies.first > 0) {
    multiply_any<T, S, Down, Masked>(acc, lanes, copies, 0, copies.first, at);
    mask_sums<S>(acc, Philox(p.keep), at.row0 + at.warp_row, at.column0 + at.warp_column, p.keep_scale);
  }
  int step = copies.first;
  if constexpr (sizeof(T) == 2)
    if (steady > step) {
      multiply_base<T, S, Down, Masked>(acc, lanes, copies, step, steady, early ? Awaited() : awaited);
      step = steady;
    }
  multiply_any<T, S, Down, Masked>(acc, lanes, copies, step, copies.steps, at);
  ptx::cp_async_wait_group<0>();
  __syncthreads();  // the stages are free
}

// out = acc + bias, rounded, through shared memory: 16 bytes a store where out's rows allow it.
template <class T, class S>
__device__ inline void store_tile(const Sums<S>& acc, const LinearParams& p, const TilePlace<S>& at,
                                  unsigned char* shared) {
  T* tile = reinterpret_cast<T*>(shared);
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const T* bias = static_cast<const T*>(p.bias);
#pragma unroll
  for (int j = 0; j < S::column_blocks; ++j) {
    const int within = at.warp_column + 8 * j + 2 * t, column = at.column0 + within;
    const float even = bias && column < p.columns ? static_cast<float>(bias[column]) : 0.0f;
    const float odd = bias && column + 1 < p.columns ? static_cast<float>(bias[column + 1]) : 0.0f;
#pragma unroll
    for (int i = 0; i < S::row_blocks; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        T* to = tile + (at.warp_row + 16 * i + 8 * half + g) * S::out_stride + within;
        *reinterpret_cast<Pair<T>*>(to) = {rounded<T>(acc[i][j][2 * half] + even),
                                           rounded<T>(acc[i][j][2 * half + 1] + odd)};
      }
  }
  __syncthreads();
  const bool aligned = (reinterpret_cast<uint64_t>(p.out) | (p.out_stride * sizeof(T))) % 16 == 0;
  constexpr int chunks = S::BN / per_chunk<T>;
  for (int i = threadIdx.x; i < S::BM * chunks; i += S::threads) {
    const int row = at.row0 + i / chunks, column = at.column0 + i % chunks * per_chunk<T>;
    if (row >= p.rows) break;
    const T* from = tile + i / chunks * S::out_stride + i % chunks * per_chunk<T>;
    T* to = static_cast<T*>(p.out) + row * p.out_stride + column;
    if (aligned && column + per_chunk<T> <= p.columns) {
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    } else {
      for (int e = 0; e < per_chunk<T> && column + e < p.columns; ++e) to[e] = from[e];
    }
  }
}

}  // namespace svdkern::cuda
