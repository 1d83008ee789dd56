// The launchers of the CUDA kernels and the plain structs that they take: raw pointers and strides, no torch.
// csrc/cuda/ops.cpp fills these from tensors. T is the activations' dtype: bf16, f16 or f32. Launchers check nothing
// and allocate nothing.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../svdkern.h"

namespace svdkern::cuda {

// A factor (length, r) of any strides and dtype -> T: rows (length, R) for z F^T, or columns (R, length) for a F.
struct PackedFactor {
  const void* in = nullptr;
  int64_t row_stride = 0, rank_stride = 0;
  int length = 0;
  DType dtype = DType::f32;
  bool rows = false;
  void* out = nullptr;  // rows of 16 bytes' multiples, zeros past r and past length
  int64_t out_stride = 0;
};

struct PackParams {
  PackedFactor factors[2];
  int r = 0;
  DType dtype = DType::f32;  // T
  int* control = nullptr;    // zeroed for the launches that follow, null for none
  int counters = 0;
};

// The mask D of a (rows, cols) matrix (philox.h); threshold 0: none.
struct Keep {
  const int64_t* rng_state = nullptr;  // (seed, offset), in device memory: a captured graph draws anew
  uint32_t threshold = 0;
};

// A number in device memory, or on the host where data is null.
struct Scalar {
  const void* data = nullptr;
  DType dtype = DType::f32;
  float value = 1.0f;
};

// What stands between the product and z: z = s (h sigma | h R) g, or with gate_first s (h g) (sigma | R).
struct Epilogue {
  Vector sigma;
  Matrix core;                  // (r, r); its transpose by its strides
  const float* gate = nullptr;  // (rows, r), contiguous
  Scalar scale;
  bool gate_first = false;
};

// Products cut into `splits` pieces, summed in their order by whoever comes last: no bit depends on who that is.
struct Splits {
  float* partial = nullptr;  // (splits, rows or length, R); null where splits is 1
  int* counters = nullptr;   // one an output tile, zeroed
  int splits = 1;
};

// h = (D*a) F, float (rows, r) contiguous, and z (rows, R) in T, each only where it is wanted.
struct ShrinkParams {
  const void* a = nullptr;  // (rows, width), row-major
  int64_t a_stride = 0;
  int rows = 0, width = 0;
  const void* factor = nullptr;  // packed columns (R, width)
  int64_t factor_stride = 0;
  int r = 0;
  DType dtype = DType::f32;
  Keep keep;
  float keep_scale = 1.0f;
  Epilogue by;
  float* h = nullptr;
  void* z = nullptr;
  Splits splits;
};

// out = (D*a)^T q, (width, r), any dtype and strides.
struct OuterParams {
  const void* a = nullptr;  // (rows, width), row-major
  int64_t a_stride = 0;
  int rows = 0, width = 0;
  const void* q = nullptr;  // (rows, R) in T, contiguous
  int r = 0;
  DType dtype = DType::f32;
  Keep keep;
  float keep_scale = 1.0f;
  MutableMatrix out;
  Splits splits;  // partial: (splits, width, R)
};

// out = a w + D*(z F^T) + bias, rounded once; w and z are optional.
struct LinearParams {
  const void* a = nullptr;  // (rows, depth), row-major
  int64_t a_stride = 0;
  int rows = 0, depth = 0, columns = 0;
  const void* w = nullptr;  // (columns, depth) row-major, or with w_trans (depth, columns)
  int64_t w_stride = 0;
  bool w_trans = false;
  const void* z = nullptr;       // (rows, R) in T, contiguous
  const void* factor = nullptr;  // packed rows (columns, R)
  int r = 0;
  const void* bias = nullptr;  // (columns,) in T
  DType dtype = DType::f32;
  Keep keep;
  float keep_scale = 1.0f;
  void* out = nullptr;  // (rows, columns) row-major in T
  int64_t out_stride = 0;
};

// Sums of h = (D*a) F for few rows, F as it is: (slices, rows, r) floats, each of a part of the width; small_linear
// adds them up.
struct SmallShrinkParams {
  const void* a = nullptr;  // (rows, width), row-major
  int64_t a_stride = 0;
  int rows = 0, width = 0;
  Matrix factor;  // (width, r), any strides and dtype
  DType dtype = DType::f32;
  Keep keep;
  float keep_scale = 1.0f;
  float* sums = nullptr;
  int slices = 1;
  int* control = nullptr;  // zeroed for the launches that follow, null for none
  int counters = 0;
};

// out = a w + D*(z F^T) + bias for few rows, rounded once; w and sums, which z is made of, are optional.
struct SmallLinearParams {
  const void* a = nullptr;  // (rows, depth), row-major
  int64_t a_stride = 0;
  int rows = 0, depth = 0, columns = 0;
  const void* w = nullptr;  // (columns, depth) row-major, or with w_trans (depth, columns)
  int64_t w_stride = 0;
  bool w_trans = false;
  const float* sums = nullptr;  // (slices, rows, r), contiguous: h in parts
  int slices = 0;
  Matrix factor;  // (columns, r), any strides and dtype
  int r = 0;
  Epilogue by;
  float* h = nullptr;  // (rows, r), and z (rows, R) in T, where they are wanted
  void* z = nullptr;
  const void* bias = nullptr;  // (columns,) in T
  DType dtype = DType::f32;
  Keep keep;
  float keep_scale = 1.0f;
  void* out = nullptr;  // (rows, columns) row-major in T
  int64_t out_stride = 0;
  Splits splits;  // of the depth, and with sums one more, the adapter's; partial: (splits, rows, columns)
};

// y = x w + z V^T + bias with z of shrink, in one launch. linear.keep has no threshold; shrink.splits is one split.
struct ForwardParams {
  ShrinkParams shrink;
  LinearParams linear;
  int* control = nullptr;  // 1 + ceil(rows / forward_rows) zeros: a ticket, and a counter a row group
};
constexpr int forward_rows = 128;

// Whether this GPU and driver run the kernels: cudaErrorInsufficientDriver, cudaErrorNoKernelImageForDevice, ...
cudaError_t probe();
cudaError_t pack_launch(const PackParams&, cudaStream_t);
cudaError_t shrink_launch(const ShrinkParams&, cudaStream_t);
cudaError_t outer_launch(const OuterParams&, cudaStream_t);
cudaError_t linear_launch(const LinearParams&, cudaStream_t);
cudaError_t small_shrink_launch(const SmallShrinkParams&, cudaStream_t);
cudaError_t small_linear_launch(const SmallLinearParams&, cudaStream_t);
bool forward_serves(const LinearParams&);  // where it does not, shrink and linear are better, or all that there is
cudaError_t forward_launch(const ForwardParams&, cudaStream_t);

// Tiles of shrink's and outer's output: ceil(rows or width / tile_lines) * ceil(r / tile_ranks) counters of split sums.
constexpr int tile_lines = 64, tile_ranks = 128;

// What few rows are, and the columns of a tile of small_linear's output: one counter each where sums are split.
constexpr int small_rows = 32, small_columns = 64;

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int padded(int r) { return ceil_div(r, 16) * 16; }  // R

// What the device has: processors, and bytes of shared memory that a CTA may ask for.
struct DeviceLimits {
  int processors, shared;
};

// Tiles of linear and forward: 128 x 256, 128 x 128, 64 x 64.
enum class Tile { wide, square, small };
constexpr int wide_shared = 144 << 10, square_shared = 96 << 10;

// The tile by which all processors are through first: rounds of a tile each, by the tile's part of 64 x 64 and how well
// it uses the tensor cores. The large ones copy whole chunks, and not every GPU has their shared memory.
constexpr Tile linear_tile(int rows, int columns, bool whole_chunks, DeviceLimits of) {
  const auto rounds = [&](int height, int width) {
    return ceil_div(ceil_div(rows, height) * ceil_div(columns, width), of.processors);
  };
  const int wide = rounds(128, 256) * 16, square = rounds(128, 128) * 9, small = rounds(64, 64) * 3;
  if (!whole_chunks || of.shared < square_shared) return Tile::small;
  if (of.shared >= wide_shared && wide <= square && wide <= small) return Tile::wide;
  return square <= small ? Tile::square : Tile::small;
}

// Row tiles of a group (tile_place): so many that a round of tiles is about as high as wide.
__host__ __device__ constexpr int group_height(int tile_columns) { return tile_columns == 256 ? 16 : 8; }

// Where a tile of linear's output lies: groups of `height` row tiles, rows first within a group, so that neighbours in
// time share a tile of w and a few of a in the L2.
struct Place {
  int row, column;
};
__host__ __device__ constexpr Place tile_place(int tile, int row_tiles, int column_tiles, int height) {
  const int group = tile / (height * column_tiles), first = group * height;
  const int rows = row_tiles - first < height ? row_tiles - first : height;
  const int within = tile - group * height * column_tiles;
  return {first + within % rows, within / rows};
}

}  // namespace svdkern::cuda
