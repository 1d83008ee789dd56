// The base product of bf16 operands on AMX tiles: 16 x 16 sums and 32 products deep in one instruction, so that up to
// 16 rows cost no more than the one read of w.
//
//   dots   sums^T (16 outputs, rows) += w^T (16 outputs, 32) . pairs of a (16, rows x 2): w is loaded as it lies
//   rank   sums (rows, 16) += a (rows, 32) . pairs of rows of w (16, 16 x 2): unpacked through L1, columns in the
//   low/high
//          order of bf16_tiles.h
//
// A tile's shape is thread state: it is set when a piece of work begins and dropped when it ends. Subnormals: as
// vdpbf16ps.
#pragma once

#include "bf16_tiles.h"

#if defined(__AMX_BF16__)

namespace svdkern {
namespace {

constexpr int least_amx_rows = 5;  // below that vdpbf16ps keeps up with memory

// GCC's intrinsics for these do not say that they read memory.
template <int Tile>
inline void tile_load(const void* p, int64_t stride_bytes) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride_bytes), "i"(Tile) : "memory");
}
template <int Tile>
inline void tile_store(void* p, int64_t stride_bytes) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride_bytes), "i"(Tile) : "memory");
}
template <int Tile>
inline void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(Tile));
}
template <int C, int A, int B>
inline void tile_multiply() {  // C += A . B
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

struct TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {};
  uint8_t rows[16] = {};
  void set(int tile, int tile_rows, int bytes) {
    rows[tile] = static_cast<uint8_t>(tile_rows), bytes_per_row[tile] = static_cast<uint16_t>(bytes);
  }
};

class TileSession {
 public:
  explicit TileSession(const TileShapes& shapes) { __asm__ volatile("ldtilecfg %0" ::"m"(shapes)); }
  ~TileSession() { __asm__ volatile("tilerelease"); }
};

// sums[m][o] = a[m] . w[:, o] for n outputs; w (in, n) with columns w_out apart; pairs (in / 2, ld), zero beyond `in`.
inline void amx_dots(const bf16* w, int64_t w_out, const uint32_t* pairs, int64_t ld, int rows, int64_t in, int64_t n,
                     float* sums, int64_t sums_ld) {
  TileShapes shapes;
  for (int tile = 0; tile < 2; ++tile) shapes.set(tile, 16, 4 * rows);  // sums, two chains to cover the latency
  for (int tile = 2; tile < 4; ++tile) shapes.set(tile, 16, 64);        // w
  for (int tile = 4; tile < 6; ++tile) shapes.set(tile, 16, 4 * rows);  // a
  const TileSession session(shapes);
  alignas(64) float out[2][16 * 16];
  alignas(64) bf16 w_tail[16 * 32];
  alignas(64) uint32_t a_tail[16 * 16];
  const int64_t whole = in / 32 * 32, tail = in - whole;
  if (tail != 0) {
    std::memset(a_tail, 0, sizeof(a_tail));
    for (int64_t k = 0; k < (tail + 1) / 2; ++k) std::memcpy(a_tail + k * 16, pairs + (whole / 2 + k) * ld, 4 * rows);
  }
  for (int64_t o = 0; o < n; o += 16) {
    const int64_t high = smaller<int64_t>(16, n - o);
    const bf16* block = w + o * w_out;
    tile_zero<0>();
    tile_zero<1>();
    if (high == 16) {
      int64_t k = 0;
      for (; k + 64 <= whole; k += 64) {
        tile_load<2>(block + k, 2 * w_out);
        tile_load<4>(pairs + k / 2 * ld, 4 * ld);
        tile_multiply<0, 2, 4>();
        tile_load<3>(block + k + 32, 2 * w_out);
        tile_load<5>(pairs + (k / 2 + 16) * ld, 4 * ld);
        tile_multiply<1, 3, 5>();
      }
      if (k < whole) {
        tile_load<2>(block + k, 2 * w_out);
        tile_load<4>(pairs + k / 2 * ld, 4 * ld);
        tile_multiply<0, 2, 4>();
      }
    } else {  // the last few outputs: rows of the tile that do not exist are zero
      for (int64_t k = 0; k < whole; k += 32) {
        std::memset(w_tail, 0, sizeof(w_tail));
        for (int64_t i = 0; i < high; ++i) std::memcpy(w_tail + i * 32, block + i * w_out + k, 64);
        tile_load<2>(w_tail, 64);
        tile_load<4>(pairs + k / 2 * ld, 4 * ld);
        tile_multiply<0, 2, 4>();
      }
    }
    if (tail != 0) {
      std::memset(w_tail, 0, sizeof(w_tail));
      for (int64_t i = 0; i < high; ++i) std::memcpy(w_tail + i * 32, block + i * w_out + whole, 2 * tail);
      tile_load<2>(w_tail, 64);
      tile_load<4>(a_tail, 64);
      tile_multiply<0, 2, 4>();
    }
    tile_store<0>(out[0], 64);
    tile_store<1>(out[1], 64);
    for (int64_t i = 0; i < high; ++i)
      for (int m = 0; m < rows; ++m) sums[m * sums_ld + o + i] = out[0][i * 16 + m] + out[1][i * 16 + m];
  }
}

constexpr int blocks_a_run = 4;  // of 32 columns: w's rows are read in runs of 256 bytes

// 32 rows (those from `depth` on zero) x up to blocks_a_run * 32 columns of w, each 32 columns as two tiles of pairs.
inline void unpack_blocks(const bf16* w, int64_t w_in, int64_t depth, int64_t columns, int64_t prefetch, bf16* low) {
  for (int64_t k = 0; k < 32; k += 2) {
    const bf16* row = w + k * w_in;
    for (int64_t col = 0; col < columns; col += pair_columns, row += pair_columns) {
      bf16* to = low + col / pair_columns * 2 * 16 * 32 + k * 16;
      const int64_t here = columns - col;
      __m512i r0 = {}, r1 = {};
      if (k < depth) r0 = here >= pair_columns ? load_raw(row) : load_raw(row, here);
      if (k + 1 < depth) r1 = here >= pair_columns ? load_raw(row + w_in) : load_raw(row + w_in, here);
      if (prefetch != 0) {
        __builtin_prefetch(row + prefetch, 0, 2);
        __builtin_prefetch(row + w_in + prefetch, 0, 2);
      }
      _mm512_store_si512(to, _mm512_maskz_unpacklo_epi16(~0u, r0, r1));
      _mm512_store_si512(to + 16 * 32, _mm512_maskz_unpackhi_epi16(~0u, r0, r1));
    }
  }
}

// sums (low/high order) += a w for `columns` outputs; a (rows, in) zero from `in` up to a multiple of 32, w (in,
// columns).
inline void amx_rank(const bf16* w, int64_t w_in, const bf16* a, int64_t lda, int rows, int64_t in, int64_t columns,
                     float* sums, int64_t sums_ld) {
  TileShapes shapes;
  for (int tile = 0; tile < 2; ++tile) shapes.set(tile, rows, 64);  // sums: low, high
  shapes.set(2, rows, 64);                                          // a
  for (int tile = 4; tile < 6; ++tile) shapes.set(tile, 16, 64);    // w
  const TileSession session(shapes);
  constexpr int64_t run = blocks_a_run * pair_columns;
  alignas(64) bf16 blocks[blocks_a_run * 2 * 16 * 32];  // of 32 columns: low, high
  for (int64_t k = 0; k < in; k += 32) {
    const int64_t ahead = k + 64 <= in ? 32 * w_in : 0;
    tile_load<2>(a + k, 2 * lda);
    for (int64_t from = 0; from < columns; from += run) {
      const int64_t wide = smaller(run, columns - from);
      unpack_blocks(w + k * w_in + from, w_in, in - k, wide, ahead, blocks);
      for (int64_t col = 0; col < wide; col += pair_columns) {
        float* to = sums + from + col;
        tile_load<0>(to, 4 * sums_ld);
        tile_load<1>(to + W, 4 * sums_ld);
        tile_load<4>(blocks + col / pair_columns * 2 * 16 * 32, 64);
        tile_load<5>(blocks + (col / pair_columns * 2 + 1) * 16 * 32, 64);
        tile_multiply<0, 2, 4>();
        tile_multiply<1, 2, 5>();
        tile_store<0>(to, 4 * sums_ld);
        tile_store<1>(to + W, 4 * sums_ld);
      }
    }
  }
}

}  // namespace
}  // namespace svdkern

#endif
