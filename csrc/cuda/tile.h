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

// Starts to copy rows row0 ... and Chunks chunks from column0 on; by cp.async where rows are aligned, which Aligned
// promises. A thread copies one chunk of every Threads / Chunks-th row. Part: of Parts calls that make a copy, this
// one.
template <int Rows, int Chunks, int Threads, bool Aligned = false, int Part = 0, int Parts = 1, class T>
__device__ inline void copy_tile(unsigned char* tile, const Source<T>& from, int row0, int column0) {
  constexpr int apart = Threads / Chunks, count = ceil_div(Rows, apart), first = count * Part / Parts;
  static_assert(count == 1 || (Rows % apart == 0 && apart % 8 == 0));  // a thread's rows have its chunk at one place
  const int row = threadIdx.x / Chunks, chunk = threadIdx.x % Chunks, column = column0 + chunk * per_chunk<T>;
  const int left = max(min(from.columns - column, per_chunk<T>), 0), rows = from.rows - row0 - row;
  const T* at = from.data + (row0 + row) * from.stride + column;
  unsigned char* to = tile + chunk_offset(row, chunk);
  if (Rows < apart && row >= Rows) return;
#pragma unroll
  for (int i = first; i < count * (Part + 1) / Parts; ++i) {
    const int elements = i * apart < rows ? left : 0;
    const T* source = at + i * apart * from.stride;  // not looked at where nothing is left
    unsigned char* place = to + i * apart * row_bytes;
    if (Aligned || from.aligned) {
      ptx::cp_async_16(static_cast<uint32_t>(__cvta_generic_to_shared(place)), source,
                       elements * static_cast<int>(sizeof(T)));
    } else {
      Chunk<T> copied;
#pragma unroll
      for (int e = 0; e < per_chunk<T>; ++e)
        if (e < elements) copied.element[e] = source[e];
      *reinterpret_cast<uint4*>(place) = copied.bits;
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
