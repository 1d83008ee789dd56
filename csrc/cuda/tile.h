// Tiles of a row-major matrix in shared memory: rows of 128 bytes (64 elements of 16 bits, 32 of f32), eight 16-byte
// chunks each.
//
//   row r:  chunk c lies at place c ^ (r % 8), so that eight rows' chunks c are in eight different groups of banks:
//   reading a
//           column of chunks (ldmatrix) and writing a row of them (cp.async) both go without conflicts
//
// A thread copies the same chunks of every tile, so it may mask them with no barrier once its own copies have come.
#pragma once

#include "philox.h"
#include "ptx/cp_async.h"

namespace svdkern::cuda {

constexpr int row_bytes = 128, row_chunks = row_bytes / 16;

template <class T>
constexpr int row_elements = row_bytes / sizeof(T);

__host__ __device__ constexpr int chunk_offset(int row, int chunk) {
  return row * row_bytes + ((chunk ^ (row % 8)) << 4);
}

// A row-major matrix whose tiles are copied: zeros outside.
template <class T>
struct Source {
  const T* data;
  int64_t stride;
  int rows, columns;
  bool aligned;  // every row begins at a multiple of 16 bytes

  __device__ Source(const void* at, int64_t stride, int rows, int columns)
      : data(static_cast<const T*>(at)),
        stride(stride),
        rows(rows),
        columns(columns),
        aligned((reinterpret_cast<uint64_t>(at) | (stride * sizeof(T))) % 16 == 0) {}
};

// Starts to copy rows row0 ... and Chunks chunks from column0 on; by cp.async where rows are aligned.
template <int Rows, int Chunks, int Threads, class T>
__device__ inline void copy_tile(unsigned char* tile, const Source<T>& from, int row0, int column0) {
  static_assert(Rows * Chunks % Threads == 0);
#pragma unroll
  for (int i = 0; i < Rows * Chunks / Threads; ++i) {
    const int place = i * Threads + threadIdx.x, row = place / Chunks, chunk = place % Chunks;
    const int column = column0 + chunk * per_chunk<T>;
    const int left = row0 + row < from.rows ? max(min(from.columns - column, per_chunk<T>), 0) : 0;
    const T* at = from.data + (left ? (row0 + row) * from.stride + column : 0);
    unsigned char* to = tile + chunk_offset(row, chunk);
    if (from.aligned) {
      ptx::cp_async_16(static_cast<uint32_t>(__cvta_generic_to_shared(to)), at, left * static_cast<int>(sizeof(T)));
    } else {
      Chunk<T> elements;
#pragma unroll
      for (int e = 0; e < per_chunk<T>; ++e)
        if (e < left) elements.element[e] = at[e];
      *reinterpret_cast<uint4*>(to) = elements.bits;
    }
  }
}

// Masks the chunks that this thread copied, once they have come: before the barrier that shows them to others.
template <int Rows, int Chunks, int Threads, class T>
__device__ inline void mask_tile(unsigned char* tile, const Philox& philox, int row0, int column0) {
#pragma unroll
  for (int i = 0; i < Rows * Chunks / Threads; ++i) {
    const int place = i * Threads + threadIdx.x, row = place / Chunks, chunk = place % Chunks;
    uint4* at = reinterpret_cast<uint4*>(tile + chunk_offset(row, chunk));
    uint4 elements = *at;
    philox.drop<T>(elements, row0 + row, column0 + chunk * per_chunk<T>);
    *at = elements;
  }
}

}  // namespace svdkern::cuda
