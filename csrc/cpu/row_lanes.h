// a w for 5 to 64 rows of `a`, which are the lanes of the vectors.
//
//   c[o][m] = sum_k a[m][k] w[k][o]      a turned once, (in, lanes); w's elements broadcast
//
// Multiply-adds are the limit from about 8 rows up, so w is converted once for all rows, a piece at a time, into L1:
// J outputs x dots_deep of a w that is contiguous along k, the next piece while this one is multiplied; rank_deep x
// rank_wide of one that is contiguous along the outputs. The tile is the same for both, with other strides. In fp32 for
// bf16 too: vdpbf16ps does not keep up with two FMAs a cycle where it has been measured.
//
// A piece's sums start from zero and are added to c: short chains of additions, whose order does not depend on the
// split. What follows is fetched in time, into L2 only: in L1, rows of w a power of two apart would share a few sets.
#pragma once

#include "tiles.h"

namespace svdkern {
namespace {

constexpr int lane_sums = 12;                               // accumulators of a tile: they hide the latency of the FMA
constexpr int64_t dots_deep = 256;                          // k of a piece of J outputs
constexpr int64_t dots_outputs = many_registers ? 48 : 24;  // outputs between which a part of `a` stays in L1
constexpr int64_t chunk = 32;                               // of the next piece: taken while as many k are multiplied
constexpr int64_t rank_deep = 32, rank_wide = 48;           // a piece
constexpr int64_t rank_ahead = 6 * rank_wide;               // how far ahead of it w is fetched
constexpr int64_t dots_spacing = dots_deep + 16;            // rows of a piece 1 KB apart would share cache sets
static_assert(rank_wide % lane_sums == 0 && dots_outputs % lane_sums == 0 && dots_deep % (2 * chunk) == 0);

// n elements from p on into L2; harmless where they do not exist.
template <class T>
inline void fetch(const T* p, int64_t n) {
  const char* from = reinterpret_cast<const char*>(p);
  for (int64_t i = 0; i < n * static_cast<int64_t>(sizeof(T)); i += 64) __builtin_prefetch(from + i, 0, 2);
}

// p ... p + n as fp32; what follows up to a multiple of W is zero.
template <class T>
inline void widen(const T* p, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(to + i, load(p + i));
  if (i < n) store(to + i, load(p + i, n - i));
}

// c[j][v] += sum_k a[k][v] w[k, j] for J outputs and V vectors of lanes; meanwhile() is called every `chunk` of k.
template <int V, int J, int64_t KStride, int64_t OStride, class Meanwhile>
inline void lane_tile(float* c, int64_t lanes, const float* a, const float* w, int64_t depth,
                      const Meanwhile& meanwhile) {
  F sums[J][V] = {};
  const auto step = [&](int64_t k) __attribute__((always_inline)) {  // or the sums go through memory
    F row[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) row[v] = load(a + k * lanes + v * W);
#pragma GCC unroll 16
    for (int j = 0; j < J; ++j) {
      const F element = splat(w[k * KStride + j * OStride]);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sums[j][v] += row[v] * element;
    }
  };
  int64_t k = 0;
  for (; k + 4 <= depth; k += 4) {
    if (k % chunk == 0) meanwhile();
    step(k), step(k + 1), step(k + 2), step(k + 3);
  }
  for (; k < depth; ++k) step(k);
#pragma GCC unroll 16
  for (int j = 0; j < J; ++j)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      float* to = c + j * lanes + v * W;
      store(to, load(to) + sums[j][v]);
    }
}

// The same for all lanes, two vectors at a time; one that is left over has half the sums that hide the latency.
template <int J, int64_t KStride, int64_t OStride, class Meanwhile>
inline void lane_tiles(float* c, int64_t lanes, const float* a, const float* w, int64_t depth,
                       const Meanwhile& meanwhile) {
  const auto nothing = [] {};
  if constexpr (J == lane_sums) {
    lane_tile<1, J, KStride, OStride>(c, lanes, a, w, depth, meanwhile);
  } else {
    lane_tile<2, J, KStride, OStride>(c, lanes, a, w, depth, meanwhile);
    int64_t m = 2 * W;
    for (; m + 2 * W <= lanes; m += 2 * W) lane_tile<2, J, KStride, OStride>(c + m, lanes, a + m, w, depth, nothing);
    if (m < lanes) lane_tile<1, J, KStride, OStride>(c + m, lanes, a + m, w, depth, nothing);
  }
}

// c (n rounded up to J, lanes) += ... for w contiguous along k, outputs w_out apart.
template <int J, class T>
[[gnu::noinline]] inline void lanes_by_dots(const T* w, int64_t w_out, int64_t in, int64_t n, const float* a,
                                            int64_t lanes, float* c) {
  alignas(64) float pieces[2 * J * dots_spacing];
  // outputs o ... o + J, elements k + from ... k + to
  const auto take = [&](int64_t o, int64_t k, int64_t from, int64_t to, float* piece) {
    if (to - from == chunk) {  // unrolled: as loops this is several times slower between multiply-adds
#pragma GCC unroll 16
      for (int64_t j = 0; j < J; ++j) {
        const T* row = w + smaller(o + j, n - 1) * w_out + k + from;
#pragma GCC unroll 4
        for (int64_t i = 0; i < chunk; i += W) store(piece + j * dots_spacing + from + i, load(row + i));
      }
    } else if (from < to) {
      for (int64_t j = 0; j < J; ++j)
        widen(w + smaller(o + j, n - 1) * w_out + k + from, to - from, piece + j * dots_spacing + from);
    }
  };
  // the part of `a` stays in L1
  const int64_t most = lanes <= 16 ? dots_deep : dots_deep / 2;
  float *piece = pieces, *next = pieces + J * dots_spacing;
  take(0, 0, 0, smaller(most, in), piece);
  for (int64_t k = 0; k < in; k += most)
    for (int64_t o = 0; o < n; o += J) {
      const bool same_k = o + J < n;
      const int64_t next_o = same_k ? o + J : 0, next_k = same_k ? k : k + most;
      const int64_t deep = smaller(most, in - k), next_deep = larger<int64_t>(0, smaller(most, in - next_k));
      // the piece after: the same outputs, further along k, then the next outputs
      const T* later = w + (k + most < in ? o * w_out + k + most : (n + o) * w_out);
      int64_t taken = 0;
      lane_tiles<J, 1, dots_spacing>(c + o * lanes, lanes, a + k * lanes, piece, deep, [&] {
        const int64_t end = smaller(taken + chunk, next_deep);
        for (int64_t j = 0; j < J; ++j) fetch(later + j * w_out + taken, chunk);
        take(next_o, next_k, taken, end, next);
        taken = end;
      });
      take(next_o, next_k, taken, next_deep, next);
      float* const done = piece;
      piece = next, next = done;
    }
}

// c (n rounded up to J, lanes) += ... for w contiguous along the outputs, its rows w_in apart.
template <int J, class T>
[[gnu::noinline]] inline void lanes_by_rank(const T* w, int64_t w_in, int64_t in, int64_t n, const float* a,
                                            int64_t lanes, float* c) {
  constexpr int64_t tiles = rank_wide / J, rows_a_tile = (rank_deep + tiles - 1) / tiles;
  const int64_t ahead = smaller(rank_ahead, n);
  alignas(64) float piece[rank_deep * rank_wide] = {};
  for (int64_t k = 0; k < in; k += rank_deep) {
    const int64_t deep = smaller(rank_deep, in - k);
    for (int64_t o = 0; o < n; o += rank_wide) {
      const int64_t wide = smaller(rank_wide, n - o);
      for (int64_t i = 0; i < deep; ++i) widen(w + (k + i) * w_in + o, wide, piece + i * rank_wide);
      const T* later = w + (o + ahead < n ? k * w_in + o : (k + rank_deep) * w_in + o - n) + ahead;
      for (int64_t j = 0, row = 0; j < wide; j += J) {
        for (const int64_t end = j + J < wide ? smaller(row + rows_a_tile, rank_deep) : rank_deep; row < end; ++row)
          fetch(later + row * w_in, rank_wide);
        lane_tiles<J, rank_wide, 1>(c + (o + j) * lanes, lanes, a + k * lanes, piece + j, deep, [] {});
      }
    }
  }
}

}  // namespace
}  // namespace svdkern
