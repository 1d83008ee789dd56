// normal.h's products in bf16 on AMX tiles, as rough as a factor of 2^-16: what builds a Krylov space, not what is
// returned.
//
//   a = a1 + a2,  x = x1 + x2,  y = y1 + y2, each part bf16        a x ~ a1 x1 + a1 x2 + a2 x1
//
// (a2 is zero where a is stored as bf16.) A panel of rows is split on its way into the L2. y (rows, b) takes its rows
// as tiles as they lie; z^T (b, L) += y^T a takes pairs of rows, unpacked through L1 32 columns at a time.
//
// Rows are split into slots as there, which are added in order. Floor: one read of a; 12 M L b operations at the rate
// of AMX (8 for bf16).
#pragma once

#include "normal.h"

#if defined(__AMX_BF16__)

namespace svdkern {
namespace {

template <class T>
class RoughNormalPass {
 public:
  explicit RoughNormalPass(const NormalParams& p)
      : p_(p), rows_(p.a.rows), length_(p.a.cols), wide_(round_up(p.x.cols, 32)), ld_(round_up(length_, 32) + 32) {}

  void run() {
    const int64_t panels = (rows_ + height - 1) / height;
    const int64_t fit = larger<int64_t>(least_slots, slots_elements / (ld_ * wide_));
    const int64_t wanted = larger<int64_t>(1, smaller(smaller(most_slots, fit), rows_ * length_ / slot_elements));
    const int64_t each = larger<int64_t>(1, (panels + wanted - 1) / wanted);
    const int64_t slots = (panels + each - 1) / each;
    Scratch scratch;
    const int64_t depth = round_up(length_, 32);
    for (auto& part : x_) part = scratch.take<uint32_t>(depth / 2 * wide_);
    parallel(p_.parallel_for, wide_ / 32, depth * 64, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) split_x(j * 32, depth);
    });
    z_ = scratch.take<float>(slots * ld_ * wide_);
    parallel(p_.parallel_for, slots, each * height * length_ * wide_, [&](int64_t begin, int64_t end) {
      const Tiles::Session session;
      Scratch own;
      bf16* high = own.take<bf16>(height * ld_);
      bf16* low = own.take<bf16>(height * ld_);
      float* y = own.take<float>(height * wide_);
      for (int64_t slot = begin; slot < end; ++slot) {
        float* z = z_ + slot * ld_ * wide_;
        std::memset(z, 0, ld_ * wide_ * sizeof(float));
        for (int64_t i = slot * each; i < smaller(panels, (slot + 1) * each); ++i) {
          const int64_t m0 = i * height, here = smaller(height, rows_ - m0);
          load_panel(m0, here, high, low);
          forward(high, low, y);
          for (int64_t m = 0; m < here; ++m)
            std::memcpy(p_.y + (m0 + m) * p_.x.cols, y + m * wide_, p_.x.cols * sizeof(float));
          backward(here, high, low, y, z);
        }
      }
    });
    parallel(p_.parallel_for, (length_ + W - 1) / W, slots * W * wide_, [&](int64_t begin, int64_t end) {
      for (int64_t l = begin; l < end; ++l) add_slots(l * W, slots);
    });
  }

 private:
  static constexpr bool exact_a = same_type<T, bf16>;  // a2 is zero
  static constexpr int64_t height = 64;
  static constexpr int64_t least_slots = 4, most_slots = 16, slot_elements = 1 << 21, slots_elements = 1 << 21;

  static void split(F v, U16& high, U16& low) {
    high = bit_cast<U16>(_mm512_cvtneps_pbh(v));
    low = bit_cast<U16>(_mm512_cvtneps_pbh(v - upcast(high, bf16{})));
  }

  // x1, x2 as panels of 32 columns: [panel][k / 2][column][k % 2].
  void split_x(int64_t j0, int64_t depth) {
    const int64_t columns = larger<int64_t>(0, smaller<int64_t>(32, p_.x.cols - j0));
    uint32_t* to[2] = {x_[0] + j0 * depth / 2, x_[1] + j0 * depth / 2};
    for (int64_t k = 0; k < depth; k += 2)
      for (int64_t j = 0; j < 32; j += W) {
        const int64_t n = larger<int64_t>(0, smaller<int64_t>(W, columns - j));
        U32 pairs[2] = {};
        for (int64_t h = 0; h < 2; ++h) {
          if (k + h >= length_ || n == 0) continue;
          U16 part[2];
          split(load(static_cast<const float*>(p_.x.data) + (k + h) * p_.x.row_stride + j0 + j, n), part[0], part[1]);
          for (int i = 0; i < 2; ++i) pairs[i] |= zero_extended(part[i]) << (16 * static_cast<int>(h));
        }
        for (int i = 0; i < 2; ++i) store(reinterpret_cast<float*>(to[i]) + k / 2 * 32 + j, bit_cast<F>(pairs[i]));
      }
  }

  // Rows as they lie, scaled, zero beyond the matrix.
  void load_panel(int64_t m0, int64_t rows, bf16* high, bf16* low) const {
    const F s = splat(p_.scale);
    for (int64_t i = 0; i < height; ++i) {
      const T* from = static_cast<const T*>(p_.a.data) + (m0 + i) * p_.a.row_stride;
      for (int64_t l = 0; l < ld_; l += W) {
        const int64_t n = i < rows ? larger<int64_t>(0, smaller<int64_t>(W, length_ - l)) : 0;
        const F v = n == W ? s * load(from + l) : n > 0 ? s * load(from + l, n) : F{};
        U16 h, r;
        split(v, h, r);
        std::memcpy(high + i * ld_ + l, &h, sizeof(h));
        if constexpr (!exact_a) std::memcpy(low + i * ld_ + l, &r, sizeof(r));
      }
    }
  }

  void forward(const bf16* high, const bf16* low, float* y) const {
    const int64_t depth = round_up(length_, 32), row = 2 * ld_;
    for (int64_t j = 0; j < wide_; j += 32)
      for (int64_t i = 0; i < height; i += 32) {
        const bf16 *h = high + i * ld_, *r = low + i * ld_;
        const uint32_t *x1 = x_[0] + j * depth / 2, *x2 = x_[1] + j * depth / 2;
        tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
        for (int64_t k = 0; k < depth; k += 32, x1 += 16 * 32, x2 += 16 * 32) {
          tile_load<6>(x2, 128), tile_load<7>(x2 + 16, 128);
          tile_load<4>(h + k, row);
          tile_multiply<0, 4, 6>(), tile_multiply<1, 4, 7>();
          tile_load<5>(h + 16 * ld_ + k, row);
          tile_multiply<2, 5, 6>(), tile_multiply<3, 5, 7>();
          tile_load<6>(x1, 128), tile_load<7>(x1 + 16, 128);
          tile_multiply<0, 4, 6>(), tile_multiply<1, 4, 7>();
          tile_multiply<2, 5, 6>(), tile_multiply<3, 5, 7>();
          if constexpr (!exact_a) {
            tile_load<4>(r + k, row);
            tile_multiply<0, 4, 6>(), tile_multiply<1, 4, 7>();
            tile_load<5>(r + 16 * ld_ + k, row);
            tile_multiply<2, 5, 6>(), tile_multiply<3, 5, 7>();
          }
        }
        float* c = y + i * wide_ + j;
        tile_store<0>(c, 4 * wide_), tile_store<1>(c + 16, 4 * wide_);
        tile_store<2>(c + 16 * wide_, 4 * wide_), tile_store<3>(c + 16 * wide_ + 16, 4 * wide_);
      }
  }

  // z^T (b, L) += y^T a of one panel: y^T as [j][row], a as pairs of rows.
  void backward(int64_t rows, const bf16* high, const bf16* low, const float* y, float* z) const {
    Scratch scratch;
    bf16* turned[2] = {scratch.take<bf16>(wide_ * height), scratch.take<bf16>(wide_ * height)};
    for (int64_t j = 0; j < wide_; j += W)
      for (int64_t i = 0; i < height; i += W) {
        F v[W];
        for (int m = 0; m < W; ++m) v[m] = i + m < rows ? load(y + (i + m) * wide_ + j) : F{};
        transpose(v);
        for (int m = 0; m < W; ++m) {
          U16 part[2];
          split(v[m], part[0], part[1]);
          for (int t = 0; t < 2; ++t) std::memcpy(turned[t] + (j + m) * height + i, part + t, sizeof(U16));
        }
      }
    constexpr int64_t row = 2 * height, pairs = 128;
    alignas(64) uint32_t panel[2][height / 2 * 32];
    for (int64_t l = 0; l < length_; l += 32) {
      Tiles::pack_b<bf16>({high + l, DType::bf16, ld_, 1}, 0, height, 0, 32, panel[0]);
      if constexpr (!exact_a) Tiles::pack_b<bf16>({low + l, DType::bf16, ld_, 1}, 0, height, 0, 32, panel[1]);
      for (int64_t j = 0; j < wide_; j += 32) {
        float *c = z + j * ld_ + l, *below = c + 16 * ld_;
        tile_load<0>(c, 4 * ld_), tile_load<1>(c + 16, 4 * ld_);
        tile_load<2>(below, 4 * ld_), tile_load<3>(below + 16, 4 * ld_);
        for (int64_t k = 0; k < height; k += 32) {
          const bf16 *y1 = turned[0] + j * height + k, *y2 = turned[1] + j * height + k;
          const uint32_t *a1 = panel[0] + k / 2 * 32, *a2 = panel[1] + k / 2 * 32;
          tile_load<6>(a1, pairs), tile_load<7>(a1 + 16, pairs);
          tile_load<4>(y2, row);
          tile_multiply<0, 4, 6>(), tile_multiply<1, 4, 7>();
          tile_load<5>(y2 + 16 * height, row);
          tile_multiply<2, 5, 6>(), tile_multiply<3, 5, 7>();
          tile_load<4>(y1, row);
          tile_multiply<0, 4, 6>(), tile_multiply<1, 4, 7>();
          tile_load<5>(y1 + 16 * height, row);
          tile_multiply<2, 5, 6>(), tile_multiply<3, 5, 7>();
          if constexpr (!exact_a) {
            tile_load<6>(a2, pairs), tile_load<7>(a2 + 16, pairs);
            tile_multiply<0, 4, 6>(), tile_multiply<1, 4, 7>();
            tile_multiply<2, 5, 6>(), tile_multiply<3, 5, 7>();
          }
        }
        tile_store<0>(c, 4 * ld_), tile_store<1>(c + 16, 4 * ld_);
        tile_store<2>(below, 4 * ld_), tile_store<3>(below + 16, 4 * ld_);
      }
    }
  }

  // W rows of z (L, b), the slots' sum.
  void add_slots(int64_t l, int64_t slots) const {
    for (int64_t j = 0; j < wide_; j += W) {
      F v[W];
      for (int i = 0; i < W; ++i) {
        v[i] = load(z_ + (j + i) * ld_ + l);
        for (int64_t slot = 1; slot < slots; ++slot) v[i] += load(z_ + (slot * wide_ + j + i) * ld_ + l);
      }
      transpose(v);
      const int64_t n = smaller<int64_t>(W, p_.x.cols - j);
      for (int64_t i = 0; n > 0 && i < smaller<int64_t>(W, length_ - l); ++i)
        store(p_.z + (l + i) * p_.x.cols + j, v[i], n);
    }
  }

  const NormalParams& p_;
  const int64_t rows_, length_, wide_, ld_;
  uint32_t* x_[2] = {};
  float* z_ = nullptr;
};

}  // namespace
}  // namespace svdkern

#endif
