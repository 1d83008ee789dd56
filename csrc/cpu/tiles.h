// The two register tiles that every product here is made of; A is small (at most block_rows rows), B is streamed.
//
//   dots   C[i][j] += sum_k A[i][k] B[j][k]     k contiguous in both: lanes of partial sums, added up at the very end
//   rank   C[i][c] += sum_k A[k][i] B[k][c]     c contiguous in B and C: A[k][i] broadcast
//
// An element of C is the same sum in the same order whatever tile it falls in. Floor: one read of B for all of A's
// rows.
#pragma once

#include "vec.h"

namespace svdkern {
namespace {

constexpr int block_rows = 16;            // rows of A in one pass over B
constexpr bool many_registers = W == 16;  // 32 vector registers (AVX-512), else 16
constexpr int max_j = 8;                  // B rows in one dots tile, at most

// lanes[i * max_j + j] += lanes of A[i] . B[j], over n columns; rows of A are readable (and zero) up to a multiple of
// W.
template <class T, int I, int J>
inline void dot_tile(F* lanes, const float* a, int64_t lda, const T* const (&b)[max_j], int64_t column, int64_t n) {
  F acc[I][J];
  for (int i = 0; i < I; ++i)
    for (int j = 0; j < J; ++j) acc[i][j] = lanes[i * max_j + j];
  const auto step = [&](int64_t k, auto load_b) __attribute__((always_inline)) {
    F bv[J];
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) bv[j] = load_b(b[j] + column + k);
#pragma GCC unroll 8
    for (int i = 0; i < I; ++i) {
      const F av = load(a + i * lda + column + k);
#pragma GCC unroll 8
      for (int j = 0; j < J; ++j) acc[i][j] += av * bv[j];
    }
  };
  int64_t k = 0;
  for (; k + W <= n; k += W) step(k, [](const T* p) { return load(p); });
  if (k < n) step(k, [tail = n - k](const T* p) { return load(p, tail); });
  for (int i = 0; i < I; ++i)
    for (int j = 0; j < J; ++j) lanes[i * max_j + j] = acc[i][j];
}

template <class T, int J>
inline void dot_tiles(F* lanes, const float* a, int64_t lda, int rows, const T* const (&b)[max_j], int64_t column,
                      int64_t n) {
  int i = 0;
  if constexpr (!many_registers && J == 2)
    for (; i + 6 <= rows; i += 6) dot_tile<T, 6, J>(lanes + i * max_j, a + i * lda, lda, b, column, n);
  for (; i + 4 <= rows; i += 4) dot_tile<T, 4, J>(lanes + i * max_j, a + i * lda, lda, b, column, n);
  if constexpr (many_registers || J <= 3)
    if (i + 3 == rows) return dot_tile<T, 3, J>(lanes + i * max_j, a + i * lda, lda, b, column, n);
  if (i + 2 <= rows) {
    dot_tile<T, 2, J>(lanes + i * max_j, a + i * lda, lda, b, column, n);
    i += 2;
  }
  if (i < rows) dot_tile<T, 1, J>(lanes + i * max_j, a + i * lda, lda, b, column, n);
}

// How many rows of B a dots tile takes for this many rows of A: accumulators fill the registers, and hide FMA latency.
constexpr int dot_width(int rows) { return rows == 1 ? 8 : many_registers || rows <= 3 ? 4 : 2; }

template <int N>
struct Width {
  static constexpr int value = N;
};

// Calls body(Width<dot_width(rows)>).
template <class Body>
inline void with_dot_width(int rows, const Body& body) {
  switch (dot_width(rows)) {
    case 8:
      return body(Width<8>{});
    case 4:
      return body(Width<4>{});
    default:
      return body(Width<2>{});
  }
}

template <class T>
constexpr int vectors_a_line = W * sizeof(T) < 64 ? 64 / (W * sizeof(T)) : 1;

// V vectors of columns of C; `tail` < W: only so many of the last vector's columns exist in B.
template <class T, int I, int V, bool Tail>
inline void rank_tile(float* c, int64_t ldc, const float* a, int64_t lda, const T* b, int64_t ldb, int64_t depth,
                      int64_t tail, int64_t prefetch) {
  F acc[I][V];
  for (int i = 0; i < I; ++i)
    for (int v = 0; v < V; ++v) acc[i][v] = load(c + i * ldc + v * W);
  for (int64_t k = 0; k < depth; ++k) {
    F bv[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      if constexpr (Tail)
        bv[v] = load(b + k * ldb, tail);
      else
        bv[v] = load(b + k * ldb + v * W);
    }
    if (prefetch != 0)
      for (int v = 0; v < V; v += vectors_a_line<T>) __builtin_prefetch(b + k * ldb + prefetch + v * W);
#pragma GCC unroll 8
    for (int i = 0; i < I; ++i) {
      const F av = splat(a[k * lda + i]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) acc[i][v] += av * bv[v];
    }
  }
  for (int i = 0; i < I; ++i)
    for (int v = 0; v < V; ++v) store(c + i * ldc + v * W, acc[i][v]);
}

template <class T, int I, int V>
inline void rank_strip(float* c, int64_t ldc, const float* a, int64_t lda, const T* b, int64_t ldb, int64_t depth,
                       int64_t columns, int64_t prefetch) {
  int64_t col = 0;
  for (; col + V * W <= columns; col += V * W)
    rank_tile<T, I, V, false>(c + col, ldc, a, lda, b + col, ldb, depth, 0, prefetch);
  for (; col + W <= columns; col += W)
    rank_tile<T, I, 1, false>(c + col, ldc, a, lda, b + col, ldb, depth, 0, prefetch);
  if (col < columns) rank_tile<T, I, 1, true>(c + col, ldc, a, lda, b + col, ldb, depth, columns - col, 0);
}

// C (rows, columns) += A^T B; a is (depth, rows), rows of c are writable up to a multiple of W. prefetch: how many
// elements ahead the B of the next call lies (0: it is in cache; else one strip holds all the rows).
template <class T>
inline void rank_update(float* c, int64_t ldc, int64_t rows, const float* a, int64_t lda, const T* b, int64_t ldb,
                        int64_t depth, int64_t columns, int64_t prefetch = 0) {
  int64_t i = 0;
  if constexpr (many_registers)
    for (; i + 8 <= rows; i += 8) {
      rank_strip<T, 8, 2>(c + i * ldc, ldc, a + i, lda, b, ldb, depth, columns, prefetch);
    }
  else
    for (; i + 6 <= rows; i += 6) rank_strip<T, 6, 2>(c + i * ldc, ldc, a + i, lda, b, ldb, depth, columns, prefetch);
  for (; i + 4 <= rows; i += 4)
    rank_strip<T, 4, many_registers ? 4 : 2>(c + i * ldc, ldc, a + i, lda, b, ldb, depth, columns, prefetch);
  if (i + 3 == rows) return rank_strip<T, 3, 3>(c + i * ldc, ldc, a + i, lda, b, ldb, depth, columns, prefetch);
  if (i + 2 <= rows) {
    rank_strip<T, 2, 4>(c + i * ldc, ldc, a + i, lda, b, ldb, depth, columns, prefetch);
    i += 2;
  }
  if (i < rows) rank_strip<T, 1, 8>(c + i * ldc, ldc, a + i, lda, b, ldb, depth, columns, prefetch);
}

}  // namespace
}  // namespace svdkern
