// Both products of a block Krylov step from one read of a:    y = s a x    z = s a^T y
//
//   a (M, L), one unit stride, any storage type    x (L, b), y (M, b), z (L, b) fp32    s a factor (a power of two)
//
// A panel of rows is brought into the L2 as fp32, scaled, its rows a padded stride apart (rows a power of two apart
// would share their cache sets); both products then read it there:
//
//   y (rows, b) = panel . x           tiles of y, a's elements broadcast along k
//   z (L, b)   += panel^T . y         tiles of z, a's elements broadcast down the rows
//
// Prefetching the next panel, or the sums, was tried and gained nothing. Rows are split into `slots` ranges by the
// shape alone, each with a z of its own; those are added in order at the end, so no bit depends on the number of
// threads. Sums of a piece start at zero: chains of additions are short.
//
// Workspace: up to 16 slots of (L, b) fp32, about 8 MB; for each thread one panel, half a MB or 28 rows. Floor: one
// read of a, 4 M L b operations.
#pragma once

#include "engine.h"
#include "parallel.h"
#include "scratch.h"

namespace svdkern {
namespace {

class NormalPass {
 public:
  explicit NormalPass(const NormalParams& p)
      : p_(p),
        rows_(p.a.rows),
        length_(p.a.cols),
        wide_(round_up(p.x.cols, W)),
        padded_(round_up(length_, tile)),
        ld_(round_up(padded_, W) + W),
        height_(round_up(larger(2 * tile, smaller(most_height, panel_elements / larger<int64_t>(1, length_))), tile)) {}

  template <class T>
  void run() {
    const int64_t panels = (rows_ + height_ - 1) / height_;
    const int64_t fit = larger<int64_t>(least_slots, slots_elements / (padded_ * wide_));
    const int64_t wanted = larger<int64_t>(1, smaller(smaller(most_slots, fit), rows_ * length_ / slot_elements));
    const int64_t each = larger<int64_t>(1, (panels + wanted - 1) / wanted);  // panels of a slot
    const int64_t slots = (panels + each - 1) / each;
    Scratch scratch;
    x_ = static_cast<const float*>(p_.x.data), x_ld_ = p_.x.row_stride;
    if (wide_ != p_.x.cols) {
      float* copy = scratch.take<float>(length_ * wide_);
      for (int64_t l = 0; l < length_; ++l) copy_row(x_ + l * x_ld_, p_.x.cols, copy + l * wide_, wide_);
      x_ = copy, x_ld_ = wide_;
    }
    z_ = scratch.take<float>(slots * padded_ * wide_);
    parallel(p_.parallel_for, slots, each * height_ * length_ * wide_, [&](int64_t begin, int64_t end) {
      Scratch own;
      float* panel = own.take<float>(height_ * ld_);
      float* y = own.take<float>(height_ * wide_);
      for (int64_t slot = begin; slot < end; ++slot)
        for (int64_t i = slot * each; i < smaller(panels, (slot + 1) * each); ++i) {
          const int64_t m0 = i * height_, here = smaller(height_, rows_ - m0);
          load_panel<T>(m0, here, panel);
          forward(here, panel, y);
          for (int64_t m = 0; m < here; ++m)
            std::memcpy(p_.y + (m0 + m) * p_.x.cols, y + m * wide_, p_.x.cols * sizeof(float));
          backward(here, panel, y, z_ + slot * padded_ * wide_, i == slot * each);
        }
    });
    parallel(p_.parallel_for, length_, slots * wide_, [&](int64_t begin, int64_t end) {
      for (int64_t l = begin; l < end; ++l) add_slots(l, slots);
    });
  }

 private:
  static constexpr int64_t tile = Fma::tile_rows;
  static constexpr int64_t most_height = 112, panel_elements = 1 << 17;  // half a MB: with x and z in the L2
  static constexpr int64_t piece = W == 16 ? 96 : 128;                   // of x: stays in L1 while the rows pass
  // slots: one for 2 million elements of a, at most 8 MB of z unless those are fewer than 4
  static constexpr int64_t least_slots = 4, most_slots = 16, slot_elements = 1 << 21, slots_elements = 1 << 21;

  static void copy_row(const float* from, int64_t n, float* to, int64_t padded) {
    std::memcpy(to, from, n * sizeof(float));
    std::memset(to + n, 0, (padded - n) * sizeof(float));
  }

  // panel[i][l] = s a[m0 + i][l]; zero for columns up to padded_ and for rows up to a multiple of the tile.
  template <class T>
  void load_panel(int64_t m0, int64_t rows, float* panel) const {
    const F s = splat(p_.scale);
    const int64_t all = round_up(rows, tile);
    for (int64_t i = rows; i < all; ++i) std::memset(panel + i * ld_, 0, ld_ * sizeof(float));
    if (p_.a.col_stride == 1) {
      for (int64_t i = 0; i < rows; ++i) {
        const T* from = static_cast<const T*>(p_.a.data) + (m0 + i) * p_.a.row_stride;
        float* to = panel + i * ld_;
        int64_t l = 0;
        for (; l + W <= length_; l += W) store(to + l, s * load(from + l));
        for (; l < ld_; l += W) store(to + l, l < length_ ? s * load(from + l, length_ - l) : F{});
      }
      return;
    }
    for (int64_t l = 0; l < ld_; l += W)
      for (int64_t i = 0; i < rows; i += W) {
        const int64_t down = smaller<int64_t>(W, rows - i),
                      across = larger<int64_t>(0, smaller<int64_t>(W, length_ - l));
        F v[W] = {};
        for (int64_t k = 0; k < across; ++k) {
          const T* from = static_cast<const T*>(p_.a.data) + (l + k) * p_.a.col_stride + m0 + i;
          v[k] = s * (down == W ? load(from) : load(from, down));
        }
        transpose(v);
        for (int64_t k = 0; k < down; ++k) store(panel + (i + k) * ld_ + l, v[k]);
      }
  }

  // c (tile, V W) (+)= sum over k of a[i a_row + k a_step] b[k][...], the sum made first.
  template <int V>
  static void step(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_ld, int64_t depth, float* c,
                   int64_t c_ld, bool first) {
    F acc[tile][V] = {};
    for (int64_t k = 0; k < depth; ++k) {
      F bv[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) bv[v] = load(b + k * b_ld + v * W);
#pragma GCC unroll 16
      for (int i = 0; i < tile; ++i) {
        const F av = splat(a[i * a_row + k * a_step]);
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) acc[i][v] += av * bv[v];
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < tile; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        float* at = c + i * c_ld + v * W;
        store(at, first ? acc[i][v] : load(at) + acc[i][v]);
      }
  }

  void forward(int64_t rows, const float* panel, float* y) const {
    for (int64_t l = 0; l < length_; l += piece) {
      const int64_t deep = smaller(piece, length_ - l);
      for (int64_t j = 0; j < wide_; j += 2 * W)
        for (int64_t i = 0; i < rows; i += tile) {
          const float *a = panel + i * ld_ + l, *b = x_ + l * x_ld_ + j;
          float* c = y + i * wide_ + j;
          j + W < wide_ ? step<2>(a, ld_, 1, b, x_ld_, deep, c, wide_, l == 0)
                        : step<1>(a, ld_, 1, b, x_ld_, deep, c, wide_, l == 0);
        }
    }
  }

  void backward(int64_t rows, const float* panel, const float* y, float* z, bool first) const {
    for (int64_t l = 0; l < length_; l += tile)
      for (int64_t j = 0; j < wide_; j += 2 * W) {
        float* c = z + l * wide_ + j;
        j + W < wide_ ? step<2>(panel + l, 1, ld_, y + j, wide_, rows, c, wide_, first)
                      : step<1>(panel + l, 1, ld_, y + j, wide_, rows, c, wide_, first);
      }
  }

  void add_slots(int64_t l, int64_t slots) const {
    for (int64_t j = 0; j < wide_; j += W) {
      F total = load(z_ + l * wide_ + j);
      for (int64_t slot = 1; slot < slots; ++slot) total += load(z_ + (slot * padded_ + l) * wide_ + j);
      const int64_t n = smaller<int64_t>(W, p_.x.cols - j);
      float* to = p_.z + l * p_.x.cols + j;
      n == W ? store(to, total) : store(to, total, n);
    }
  }

  const NormalParams& p_;
  const int64_t rows_, length_, wide_, padded_, ld_, height_;
  const float* x_ = nullptr;
  int64_t x_ld_ = 0;
  float* z_ = nullptr;
};

// The sum of squares of s a in fp64: rows in ranges, each range's sum in lanes, both added in order.
template <class T>
inline void energy_as(const EnergyParams& p) {
  constexpr int64_t range_elements = 1 << 16;
  const int64_t rows = p.a.rows, length = p.a.cols;
  const int64_t each = larger<int64_t>(1, range_elements / larger<int64_t>(1, length)),
                ranges = (rows + each - 1) / each;
  Scratch scratch;
  double* sums = scratch.take<double>(ranges);
  const F s = splat(p.scale);
  typedef float H __attribute__((vector_size(2 * W)));
  typedef double D __attribute__((vector_size(4 * W)));
  struct Halves {
    H half[2];
  };
  parallel(p.parallel_for, ranges, each * length, [&](int64_t begin, int64_t end) {
    for (int64_t range = begin; range < end; ++range) {
      D lanes[4] = {};
      for (int64_t m = range * each; m < smaller(rows, (range + 1) * each); ++m) {
        const T* from = static_cast<const T*>(p.a.data) + m * p.a.row_stride;
        int64_t l = 0, turn = 0;
        for (; l < length; l += W, turn ^= 2) {
          const Halves v = bit_cast<Halves>(s * (l + W <= length ? load(from + l) : load(from + l, length - l)));
          for (int h = 0; h < 2; ++h) {
            const D wide = __builtin_convertvector(v.half[h], D);
            lanes[turn + h] += wide * wide;
          }
        }
      }
      const D total = (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
      sums[range] = 0;
      for (int i = 0; i < W / 2; ++i) sums[range] += total[i];
    }
  });
  *p.out = 0;
  for (int64_t range = 0; range < ranges; ++range) *p.out += sums[range];
}

}  // namespace
}  // namespace svdkern
