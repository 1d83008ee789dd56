// out = a^T a of a bf16 matrix on AMX tiles: products are exact, sums fp32.
//
//   a (M, L) bf16, one unit stride    out (L, L) fp32, contiguous, symmetric to the bit
//
// A panel of 512 rows is packed both ways: as rows of a^T (k contiguous) and as pairs of rows of a. Then every 32 x 32
// block on and below the diagonal adds its 16 steps; what lies above is copied from below at the end. No bit depends
// on the threads. Workspace: 2 KB a column. Floor: M L^2 / 2 multiply-adds at the rate of AMX; out is read and written
// for every panel.
#pragma once

#include "engine.h"
#include "parallel.h"
#include "scratch.h"

#if defined(__AMX_BF16__)

namespace svdkern {
namespace {

class GramPass {
 public:
  explicit GramPass(const GramParams& p) : p_(p), length_(p.a.cols), blocks_((p.a.cols + 31) / 32) {}

  void run() {
    Scratch scratch;
    turned_ = scratch.take<uint32_t>(blocks_ * 32 * pairs);
    paired_ = scratch.take<uint32_t>(blocks_ * 32 * pairs);
    for (int64_t m0 = 0; m0 < p_.a.rows; m0 += height) {
      const int64_t here = smaller(height, p_.a.rows - m0);
      parallel(p_.parallel_for, blocks_, height * 32, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) p_.a.col_stride == 1 ? pack_rows(i, m0, here) : pack_columns(i, m0, here);
      });
      // Block rows i and blocks_ - 1 - i together are as much work as any other two.
      const int64_t twos = (blocks_ + 1) / 2;
      parallel(p_.parallel_for, twos, height * 32 * 16 * (blocks_ + 1), [&](int64_t begin, int64_t end) {
        const Tiles::Session session;
        for (int64_t i = begin; i < end; ++i) {
          block_row(i, m0 == 0);
          if (i != blocks_ - 1 - i) block_row(blocks_ - 1 - i, m0 == 0);
        }
      });
    }
    parallel(p_.parallel_for, blocks_, length_ * 16, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) mirror(i);
    });
  }

 private:
  static constexpr int64_t height = 512, pairs = height / 2;

  // turned_ [block][pair of rows / 16][column of 32][16], paired_ [block][pair of rows][column of 32]
  uint32_t* turned(int64_t block) const { return turned_ + block * 32 * pairs; }
  uint32_t* paired(int64_t block) const { return paired_ + block * 32 * pairs; }

  void pack_rows(int64_t block, int64_t m0, int64_t here) const {
    const bf16* from = static_cast<const bf16*>(p_.a.data) + m0 * p_.a.row_stride + block * 32;
    for (int64_t j = 0; j < 32; j += W) {
      const int64_t n = larger<int64_t>(0, smaller<int64_t>(W, length_ - block * 32 - j));
      for (int64_t k = 0; k < pairs; k += W) {
        F v[W];
        for (int64_t i = 0; i < W; ++i) {
          U32 both = {};
          for (int h = 0; h < 2; ++h) {
            const int64_t row = 2 * (k + i) + h;
            U16 raw = {};
            if (row < here) std::memcpy(&raw, from + row * p_.a.row_stride + j, 2 * n);
            both |= zero_extended(raw) << (16 * h);
          }
          v[i] = bit_cast<F>(both);
          store(reinterpret_cast<float*>(paired(block) + (k + i) * 32 + j), v[i]);
        }
        transpose(v);
        for (int64_t i = 0; i < W; ++i) store(reinterpret_cast<float*>(turned(block) + k * 32 + (j + i) * 16), v[i]);
      }
    }
  }

  void pack_columns(int64_t block, int64_t m0, int64_t here) const {
    for (int64_t j = 0; j < 32; ++j) {
      const int64_t rows = block * 32 + j < length_ ? here : 0;
      const bf16* from = static_cast<const bf16*>(p_.a.data) + (block * 32 + j) * p_.a.col_stride + m0;
      for (int64_t m = 0; m < height; m += 32) {
        bf16* to = reinterpret_cast<bf16*>(turned(block) + m * 16 + j * 16);
        const int64_t n = larger<int64_t>(0, smaller<int64_t>(32, rows - m));
        if (n < 32) std::memset(to, 0, 64);
        if (n > 0) std::memcpy(to, from + m, n == 32 ? 64 : 2 * n);
      }
    }
    for (int64_t j = 0; j < 32; j += W)
      for (int64_t k = 0; k < pairs; k += W) {
        F v[W];
        for (int64_t i = 0; i < W; ++i) v[i] = load(reinterpret_cast<float*>(turned(block) + k * 32 + (j + i) * 16));
        transpose(v);
        for (int64_t i = 0; i < W; ++i) store(reinterpret_cast<float*>(paired(block) + (k + i) * 32 + j), v[i]);
      }
  }

  void block_row(int64_t i, bool first) const {
    for (int64_t j = 0; j <= i; ++j) {
      alignas(64) float edge[32 * 32];
      const int64_t down = smaller<int64_t>(32, length_ - i * 32), across = smaller<int64_t>(32, length_ - j * 32);
      float* at = p_.out + i * 32 * length_ + j * 32;
      const bool whole = down == 32 && across == 32;
      float* c = whole ? at : edge;
      const int64_t ld = whole ? length_ : 32;
      if (!whole && !first)
        for (int64_t m = 0; m < down; ++m) std::memcpy(edge + m * 32, at + m * length_, across * sizeof(float));
      add_block(i, j, c, ld, first);
      if (!whole)
        for (int64_t m = 0; m < down; ++m) std::memcpy(at + m * length_, edge + m * 32, across * sizeof(float));
    }
  }

  void add_block(int64_t i, int64_t j, float* c, int64_t ld, bool first) const {
    if (first) {
      tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    } else {
      tile_load<0>(c, 4 * ld), tile_load<1>(c + 16, 4 * ld);
      tile_load<2>(c + 16 * ld, 4 * ld), tile_load<3>(c + 16 * ld + 16, 4 * ld);
    }
    const uint32_t *a = turned(i), *b = paired(j);
    for (int64_t k = 0; k < pairs; k += 16, a += 16 * 32, b += 16 * 32) {
      tile_load<6>(b, 128), tile_load<7>(b + 16, 128);
      tile_load<4>(a, 64);
      tile_multiply<0, 4, 6>(), tile_multiply<1, 4, 7>();
      tile_load<5>(a + 16 * 16, 64);
      tile_multiply<2, 5, 6>(), tile_multiply<3, 5, 7>();
    }
    tile_store<0>(c, 4 * ld), tile_store<1>(c + 16, 4 * ld);
    tile_store<2>(c + 16 * ld, 4 * ld), tile_store<3>(c + 16 * ld + 16, 4 * ld);
  }

  // Above the diagonal in rows 32 i ... : the columns below it.
  void mirror(int64_t i) const {
    const int64_t first = i * 32, last = smaller(length_, first + 32);
    for (int64_t l = first; l < length_; l += W)
      for (int64_t j = first; j < last; j += W) {
        const int64_t down = smaller<int64_t>(W, length_ - l), across = smaller<int64_t>(W, last - j);
        F v[W] = {};
        for (int64_t m = 0; m < down; ++m) v[m] = load(p_.out + (l + m) * length_ + j, across);
        transpose(v);
        for (int64_t m = 0; m < across; ++m) {
          const int64_t skip =
              larger<int64_t>(0, smaller<int64_t>(down, j + m + 1 - l));  // of row j + m: to its diagonal
          const float* lanes = reinterpret_cast<const float*>(&v[m]);
          std::memcpy(p_.out + (j + m) * length_ + l + skip, lanes + skip, (down - skip) * sizeof(float));
        }
      }
  }

  const GramParams& p_;
  const int64_t length_, blocks_;
  uint32_t *turned_ = nullptr, *paired_ = nullptr;
};

}  // namespace
}  // namespace svdkern

#endif
