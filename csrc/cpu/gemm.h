// The fused product of many rows: one packed GEMM of which the adapter is a few more columns and a few more k.
//
//   h = (D_a*a) E          z = modulate(h)          y = [a z] [w; F^T] + bias = a w + D_y*(z F^T) + bias, one rounding
//
// a (M, in), w (in, out), E (in, r), F (out, r). For few rows (512, of large weights 1024) a is packed once for all
// threads and each thread packs the columns of w that it owns, a little at a time. Above, w and F^T (and E, once) are
// packed into panels for all threads, a block of columns at a time, and each thread packs blocks of rows. Either way
// E's panels give h of the rows just packed, z is appended to them as more k, w's panels pass through L1, and y is
// written once.
//
// Workspace: many rows: panel_bytes of panels (one panel where in is larger than that allows) and for each thread
// block_bytes of packed rows (one strip likewise) and 0.3 MB of sums. Few rows: packed rows, (M, in + r) in the packed
// type, and for each thread 0.6 MB of sums (1.1 MB above 512 rows) and a piece of panels. Kept between calls up to
// Arena::kept a thread. Sums run over blocks of k whose bounds depend on the shape alone: no bit depends on threads or
// blocks.
#pragma once

#include "engine.h"
#include "parallel.h"
#include "philox.h"
#include "scratch.h"

namespace svdkern {
namespace {

constexpr int64_t panel_bytes = 16 << 20;
constexpr int64_t group_columns = 256;  // outputs whose sums a thread holds: y is written in runs of that many
constexpr int64_t group_ld = group_columns + 16;
constexpr int64_t most_rows = 256;             // in one block
constexpr int64_t most_rows_by_columns = 512;  // twice as many where the packed weight is large_weight bytes or more
constexpr int64_t large_weight = 8 << 20;
constexpr int64_t block_bytes = 4 << 20;  // of packed rows
constexpr int64_t pack_panels = 8;        // packed in turns, so much of k at a time:
constexpr int64_t pack_depth = 64, pack_depth_along_k = 256;

struct FusedJob {
  Matrix a;
  Operand2d w, e, f;  // data == nullptr: not there
  int64_t out = 0, r = 0;
  Dropout drop_a, drop_y;
  Vector bias;
  MutableMatrix y;     // data == nullptr: only h and z
  float* h = nullptr;  // (M, r): written where e is there
  float* z = nullptr;  // (M, r): written where e is there, else read
  ParallelFor parallel_for = nullptr;
  int64_t threads = 1;
};

template <class T>
class Fused {
 public:
  using E = typename EngineOf<T>::Type;
  using Element = typename E::Element;

  explicit Fused(const FusedJob& job)
      : job_(job),
        rows_(job.a.rows),
        in_(job.a.cols),
        base_depth_(round_up(in_, E::depth)),
        branch_depth_(job.f.data == nullptr ? 0 : round_up(job.r, E::depth)),
        depth_(base_depth_ + branch_depth_) {}

  // modulate(m0, rows, h, z): z rows from h rows, both (rows, r).
  template <class Modulate>
  void run(const Modulate& modulate) {
    if (rows_ == 0) return;
    Scratch scratch;
    e_ = scratch.take<Element>(has_e() ? panels_of(job_.r) * panel_size() : 0);
    const int64_t packed = panels_of(job_.out) * panel_size() * static_cast<int64_t>(sizeof(Element));
    const int64_t most = (packed < large_weight ? 1 : 2) * most_rows_by_columns;
    rows_ <= most ? by_columns(scratch, modulate) : by_rows(scratch, modulate);
  }

 private:
  struct Panels {
    const Element* data;
    int64_t stride;
    bool near;  // in this core's caches already
  };

  static int64_t panels_of(int64_t columns) { return (columns + E::tile_columns - 1) / E::tile_columns; }
  int64_t panel_size() const { return depth_ / E::per_element * E::tile_columns; }
  int64_t strip_size() const { return depth_ / E::per_element * E::tile_rows + E::a_slack; }

  bool has_y() const { return job_.y.data != nullptr; }
  bool has_e() const { return job_.e.data != nullptr; }
  int64_t e_panels() const { return has_e() ? panels_of(job_.r) : 0; }

  // Few rows: they are packed once for all threads, and each thread packs the columns that it owns, a little at a time.
  template <class Modulate>
  void by_columns(Scratch& scratch, const Modulate& modulate) {
    const int64_t strips = (rows_ + E::tile_rows - 1) / E::tile_rows;
    Element* a = scratch.take<Element>(strips * strip_size());
    parallel(job_.parallel_for, e_panels(), depth_ * E::tile_columns, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) pack_e(i);
    });
    parallel(job_.parallel_for, strips, E::tile_rows * in_ * (has_e() ? job_.r : 1), [&](int64_t begin, int64_t end) {
      [[maybe_unused]] const typename E::Session session;
      const int64_t m0 = begin * E::tile_rows;
      prepare(m0, smaller(rows_, end * E::tile_rows) - m0, has_e(), has_y(), a + begin * strip_size(), modulate);
    });
    if (!has_y() || job_.out == 0) return;
    // w is read in long runs: where it lies along k, a piece is deep and narrow
    const int64_t deepest = job_.w.k_stride == 1 && rows_ <= E::most_rows_of_deep_pieces ? 4 : 1;
    const int64_t least = (job_.out * deepest + group_columns - 1) / group_columns,
                  even = round_up(least, job_.threads);
    const int64_t wide = round_up((job_.out + even - 1) / even, E::tile_columns);
    const int64_t groups = (job_.out + wide - 1) / wide;
    parallel(job_.parallel_for, groups, rows_ * depth_ * wide, [&](int64_t begin, int64_t end) {
      [[maybe_unused]] const typename E::Session session;
      Scratch own;
      float* sums = own.take<float>(strips * E::tile_rows * group_ld);
      Element* piece = own.take<Element>(round_up(E::block_depth, E::depth) / E::per_element * group_columns);
      for (int64_t g = begin; g < end; ++g) {
        const int64_t o = g * wide, columns = smaller(wide, job_.out - o);
        int64_t from = 0, to = 0;  // the k that piece holds
        group(0, rows_, o, columns, a, sums, [&](int64_t k, int64_t deep) {
          if (k < from || k >= to) {
            from = k, to = smaller(depth_, k + deepest * deep);
            pack_w(o / E::tile_columns, panels_of(o + columns), k, to - k, piece,
                   (to - k) / E::per_element * E::tile_columns);
          }
          return Panels{piece + (k - from) / E::per_element * E::tile_columns,
                        (to - from) / E::per_element * E::tile_columns, true};
        });
      }
    });
  }

  // Many rows: for every block of columns the panels are packed once for all threads, and each thread packs its rows.
  template <class Modulate>
  void by_rows(Scratch& scratch, const Modulate& modulate) {
    split_rows();
    const int64_t panels = has_y() ? panels_of(job_.out) : 0;
    const int64_t fit = larger<int64_t>(1, panel_bytes / static_cast<int64_t>(panel_size() * sizeof(Element)));
    const int64_t at_once = smaller(fit, panels);
    Element* b = scratch.take<Element>(at_once * panel_size());
    for (int64_t j = 0; j < panels || j == 0; j += at_once) {
      const int64_t here = smaller(at_once, panels - j), extra = j == 0 ? e_panels() : 0;
      const int64_t packs = (here + pack_panels - 1) / pack_panels;
      parallel(job_.parallel_for, extra + packs, depth_ * E::tile_columns, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t p0 = (i - extra) * pack_panels, p1 = smaller(here, p0 + pack_panels);
          if (i < extra) {
            pack_e(i);
            continue;
          }
          const int64_t deep = job_.w.k_stride == 1 ? pack_depth_along_k : pack_depth;
          for (int64_t k = 0; k < depth_; k += deep)
            pack_w(j + p0, j + p1, k, smaller(deep, depth_ - k),
                   b + p0 * panel_size() + k / E::per_element * E::tile_columns, panel_size());
        }
      });
      const int64_t o0 = j * E::tile_columns, o1 = smaller(job_.out, (j + here) * E::tile_columns);
      parallel(job_.parallel_for, blocks_, 2 * worth_a_thread, [&](int64_t begin, int64_t end) {
        [[maybe_unused]] const typename E::Session session;
        Scratch own;
        Element* a = own.take<Element>(height_ / E::tile_rows * strip_size());
        float* sums = own.take<float>(height_ * group_ld);
        for (int64_t i = begin; i < end; ++i) {
          const int64_t m0 = i * height_, rows = smaller(height_, rows_ - m0);
          prepare(m0, rows, has_e() && j == 0, here != 0, a, modulate);
          for (int64_t o = o0; o < o1; o += group_columns)
            group(m0, rows, o, smaller(group_columns, o1 - o), a, sums, [&](int64_t k, int64_t) {
              return Panels{b + (o - o0) / E::tile_columns * panel_size() + k / E::per_element * E::tile_columns,
                            panel_size(), false};
            });
        }
      });
      if (panels == 0) break;
    }
  }

  // Blocks as high as is useful, and as many as there are threads to work on them.
  void split_rows() {
    const int64_t strip = larger<int64_t>(1, strip_size()) * static_cast<int64_t>(sizeof(Element));
    const int64_t strips = (rows_ + E::tile_rows - 1) / E::tile_rows;
    const int64_t most = larger<int64_t>(1, smaller(block_bytes / strip, most_rows / E::tile_rows));
    const int64_t blocks = smaller(strips, round_up((strips + most - 1) / most, job_.threads));
    height_ = (strips + blocks - 1) / blocks * E::tile_rows;
    blocks_ = (rows_ + height_ - 1) / height_;
  }

  void pack_e(int64_t panel) {
    const int64_t n0 = panel * E::tile_columns;
    with_type(job_.e.dtype, [&](auto s) {
      E::template pack_b<decltype(s)>(job_.e, 0, in_, n0, smaller(E::tile_columns, job_.r - n0),
                                      e_ + panel * panel_size());
    });
  }

  // k0 ... k0 + k of panels begin ... end, the first to `to` and the others `stride` elements apart. Panels lie side by
  // side in the inner loop, so that rows of w that run along them are read in long runs.
  void pack_w(int64_t begin, int64_t end, int64_t k0, int64_t k, Element* to, int64_t stride) const {
    const int64_t base = job_.w.data == nullptr ? 0 : smaller(k, in_ - k0), from = smaller(k0 + k, base_depth_) - k0;
    for (int64_t panel = begin; panel < end; ++panel, to += stride) {
      const int64_t n0 = panel * E::tile_columns, columns = smaller(E::tile_columns, job_.out - n0);
      if (base > 0) E::template pack_b<T>(job_.w, k0, base, n0, columns, to);
      if (from == k || job_.f.data == nullptr) continue;
      const int64_t j0 = k0 + larger<int64_t>(0, from) - base_depth_;
      with_type(job_.f.dtype, [&](auto s) {
        E::template pack_b<decltype(s)>(job_.f, j0, smaller(k0 + k - base_depth_, job_.r) - j0, n0, columns,
                                        to + larger<int64_t>(0, from) / E::per_element * E::tile_columns);
      });
    }
  }

  // Rows m0 ... m0 + rows packed, z appended; makes_z: from h = (D*a) E, stored as well.
  template <class Modulate>
  void prepare(int64_t m0, int64_t rows, bool makes_z, bool wants_y, Element* a, const Modulate& modulate) const {
    const int64_t strips = (rows + E::tile_rows - 1) / E::tile_rows;
    if (makes_z) {
      pack_rows(m0, rows, job_.drop_a, a);
      Scratch scratch;
      float* sums = scratch.take<float>(strips * E::tile_rows * group_ld);
      const float keep = static_cast<float>(1.0 / (1.0 - job_.drop_a.threshold / 65536.0));
      for (int64_t j = 0; j < job_.r; j += group_columns) {
        const int64_t columns = smaller(group_columns, job_.r - j);
        multiply(strips, columns, 0, base_depth_, a, sums, true, [&](int64_t k, int64_t) {
          return Panels{e_ + j / E::tile_columns * panel_size() + k / E::per_element * E::tile_columns, panel_size(),
                        false};
        });
        for (int64_t m = 0; m < rows; ++m) scale_by(keep, sums + m * group_ld, columns, job_.h + (m0 + m) * job_.r + j);
      }
      modulate(m0, rows, job_.h + m0 * job_.r, job_.z + m0 * job_.r);
    }
    if (!wants_y) return;
    if (job_.w.data != nullptr && !(makes_z && job_.drop_a.threshold == 0)) pack_rows(m0, rows, {}, a);
    if (job_.f.data == nullptr) return;
    for (int64_t s = 0; s < strips; ++s) {
      const int64_t m = m0 + s * E::tile_rows;
      E::pack_a(job_.z + m * job_.r, job_.r, smaller(E::tile_rows, m0 + rows - m), job_.r,
                a + s * strip_size() + base_depth_ / E::per_element * E::tile_rows);
    }
  }

  // Outputs o ... o + columns of the rows packed in a; panels(k, deep) gives the panels' k ... k + deep.
  template <class GetPanels>
  void group(int64_t m0, int64_t rows, int64_t o, int64_t columns, const Element* a, float* sums,
             const GetPanels& panels) const {
    const int64_t strips = (rows + E::tile_rows - 1) / E::tile_rows, from = job_.w.data == nullptr ? base_depth_ : 0;
    if (job_.drop_y.threshold == 0 || job_.f.data == nullptr) {
      multiply(strips, columns, from, depth_, a, sums, true, panels);
    } else {
      multiply(strips, columns, base_depth_, depth_, a, sums, true, panels);
      mask(m0, rows, o, columns, sums);
      multiply(strips, columns, from, base_depth_, a, sums, false, panels);
    }
    write(m0, rows, o, columns, sums);
  }

  void pack_rows(int64_t m0, int64_t rows, const Dropout& drop, Element* out) const {
    const T* from = static_cast<const T*>(job_.a.data) + m0 * job_.a.row_stride;
    Scratch scratch;
    T* kept = drop.threshold == 0 ? nullptr : scratch.take<T>(E::tile_rows * in_);
    for (int64_t m = 0; m < rows; m += E::tile_rows, out += strip_size()) {
      const int64_t here = smaller(E::tile_rows, rows - m);
      if (kept == nullptr) {
        E::pack_a(from + m * job_.a.row_stride, job_.a.row_stride, here, in_, out);
        continue;
      }
      for (int64_t i = 0; i < here; ++i)
        keep_run(from + (m + i) * job_.a.row_stride, drop, m0 + m + i, 0, in_, kept + i * in_);
      E::pack_a(kept, in_, here, in_, out);
    }
  }

  // sums (+)= a b over k0 ... k1 for `columns` <= group_columns.
  template <class GetPanels>
  void multiply(int64_t strips, int64_t columns, int64_t k0, int64_t k1, const Element* a, float* sums, bool first,
                const GetPanels& panels) const {
    const int64_t blocks = (k1 - k0 + E::block_depth - 1) / E::block_depth;
    const int64_t step = blocks == 0 ? 1 : round_up((k1 - k0 + blocks - 1) / blocks, E::depth);
    if (k0 == k1 && first)
      for (int64_t i = 0; i < strips * E::tile_rows; ++i) std::memset(sums + i * group_ld, 0, columns * sizeof(float));
    for (int64_t k = k0; k < k1; k += step) {
      const int64_t deep = smaller(step, k1 - k);
      const Panels b = panels(k, deep);
      const int64_t b_step = deep / E::per_element * E::tile_columns, width = panels_of(columns);
      for (int64_t j = 0; j < width; ++j)
        for (int64_t s = 0; s < strips; ++s) {
          // the next panel, or the first one's next depth, is fetched in equal parts meanwhile
          const Element* strip = a + s * strip_size() + k / E::per_element * E::tile_rows;
          if (!b.near) prefetch(j + 1 < width ? b.data + (j + 1) * b.stride : b.data + b_step, b_step, s, strips);
          E::tile(strip, b.data + j * b.stride, deep, sums + s * E::tile_rows * group_ld + j * E::tile_columns,
                  group_ld, first && k == k0, columns - j * E::tile_columns <= E::tile_columns / 2);
        }
    }
  }

  // Part `i` of `parts` of the elements from p on, into L2; a prefetch beyond the end does nothing.
  static void prefetch(const Element* p, int64_t count, int64_t i, int64_t parts) {
    constexpr int64_t line = 64 / sizeof(Element);
    const int64_t size = round_up((count + parts - 1) / parts, line);
    for (int64_t l = i * size; l < smaller(count, (i + 1) * size); l += line) __builtin_prefetch(p + l, 0, 2);
  }

  void mask(int64_t m0, int64_t rows, int64_t o, int64_t columns, float* sums) const {
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t l = 0; l < columns; l += mask_columns) {
        alignas(64) float keep[mask_columns];
        mask_row(job_.drop_y, m0 + m, o + l, keep);
        for (int64_t i = 0; i < mask_columns && l + i < round_up(columns, W); i += W) {
          float* at = sums + m * group_ld + l + i;
          store(at, masked(load(at), load(keep + i)));
        }
      }
  }

  void write(int64_t m0, int64_t rows, int64_t o, int64_t columns, const float* sums) const {
    alignas(64) float bias[group_columns] = {};
    const T* b = static_cast<const T*>(job_.bias.data);
    if (b != nullptr)
      for (int64_t i = 0; i < columns; ++i) bias[i] = to_float(b[(o + i) * job_.bias.stride]);
    for (int64_t m = 0; m < rows; ++m) {
      T* y = static_cast<T*>(job_.y.data) + (m0 + m) * job_.y.row_stride + o;
      const float* from = sums + m * group_ld;
      int64_t i = 0;
      for (; i + W <= columns; i += W) store(y + i, load(from + i) + load(bias + i));
      if (i < columns) store(y + i, load(from + i) + load(bias + i), columns - i);
    }
  }

  const FusedJob& job_;
  const int64_t rows_, in_, base_depth_, branch_depth_, depth_;
  int64_t height_ = 0, blocks_ = 0;
  Element* e_ = nullptr;
};

}  // namespace
}  // namespace svdkern
