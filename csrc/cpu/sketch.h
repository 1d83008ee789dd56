// The random start of a Krylov space, entries +-1: the same bits as svdkern/linalg/sketch.py makes anywhere else.
//
//   key = (seed_lo, seed_hi)   counter = (row, col / 128, 0, 0)   Philox4x32, 10 rounds
//   bit = bit col % 32 of output word col % 128 / 32              out = 1 - 2 bit
//
// Layout: a row a 64-bit lane, so that narrow matrices fill the vectors, too; then a row's words become columns.
// Floor: the write of out; the rounds are 80 multiplications for 128 entries.
#pragma once

#include "parallel.h"
#include "philox.h"

namespace svdkern {
namespace {

constexpr int word_bits = 32, group_columns_of_sketch = 128;

// out[i] = +-1 by the bits first ... first + n - 1 of one word.
template <class T>
inline void signs_of(uint32_t word, int64_t first, int64_t n, T* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(1 - 2 * static_cast<int32_t>(word >> (first + i) & 1));
}

template <class T>
inline void sketch_as(const SketchParams& p) {
  T* out = static_cast<T*>(p.out.data);
  const int64_t rows = p.out.rows, columns = p.out.cols, bundles = (rows + L64 - 1) / L64;
  U64 step;
  for (int i = 0; i < L64; ++i) step[i] = i;
  parallel(p.parallel_for, bundles, L64 * (columns + 32), [&](int64_t begin, int64_t end) {
    for (int64_t bundle = begin; bundle < end; ++bundle) {
      const int64_t row0 = bundle * L64, height = smaller<int64_t>(L64, rows - row0);
      for (int64_t at = 0; at < columns;) {  // `at` begins a group, or is 0
        const int64_t column = p.first + at, group = column / group_columns_of_sketch;
        const int64_t stop = smaller(columns, (group + 1) * group_columns_of_sketch - p.first);
        U64 c[4] = {step + static_cast<uint64_t>(row0), U64{} + static_cast<uint64_t>(group), U64{}, U64{}};
        philox4x32<10>(c, static_cast<uint32_t>(p.seed), static_cast<uint32_t>(p.seed >> 32));
        for (int64_t next; at < stop; at = next) {  // a word at a time
          const int64_t within = (p.first + at) % group_columns_of_sketch, first = within % word_bits;
          next = smaller(stop, at + word_bits - first);
          for (int64_t i = 0; i < height; ++i)
            signs_of(static_cast<uint32_t>(c[within / word_bits][i]), first, next - at,
                     out + (row0 + i) * columns + at);
        }
      }
    }
  });
}

}  // namespace
}  // namespace svdkern
