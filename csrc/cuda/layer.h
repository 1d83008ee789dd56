// A whole layer, forward or backward: its launches in their order, and where in one workspace lies what they hand on.
//
// clang-format off
//   rows     forward                                    backward
//   <= 32    small_shrink, small_linear                 small_shrink, small_linear (p, q, dx), modulate, outer (dU), outer (dV)
//   more     pack, forward | pack, shrink, linear       pack, shrink (p, q), linear (dx), modulate, outer (dU), outer (dV)
// clang-format on
//
// outside: the product with w is the caller's, who gets z (or q) and the packed factor instead: no linear, no forward.
// modulate: z for dV, dsigma. A launch whose results nobody wants is left out. Counters are zeroed by the first launch.
#pragma once

#include "launch.h"

namespace svdkern::cuda {

// Pieces of one block of memory, one behind the other; without a block it only counts their bytes.
class Workspace {
 public:
  explicit Workspace(void* block) : at_(static_cast<char*>(block)) {}
  bool counts() const { return at_ == nullptr; }
  int64_t bytes() const { return used_; }

  template <class T>
  T* take(int64_t count) {
    const int64_t first = used_;
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 127) / 128 * 128;
    return counts() ? nullptr : reinterpret_cast<T*>(at_ + first);
  }

 private:
  char* at_;
  int64_t used_ = 0;
};

// Counters of several launches, side by side.
struct Counters {
  int* first = nullptr;
  int count = 0;
  int* take(int more) { return count += more, first ? first + count - more : nullptr; }
};

struct LayerForward {
  ShrinkParams shrink;  // h = (D*x) u and z of it; what pack makes is not there yet
  LinearParams linear;  // y = x w + z v^T + bias
  Matrix u, v;          // (K, r), (N, r)
  bool base = true;     // whether there is a w
  bool outside = false;
  void* factor = nullptr;  // outside: (N, R) for v packed; shrink.z is the caller's, too
};

struct LayerBackward {
  ShrinkParams shrink;  // p = dy v and q of it, z being where q is wanted; h where p is
  LinearParams linear;  // dx = dy w + D*(q u^T)
  Matrix u, v;
  ModulateParams modulate;  // h, by, dsigma
  OuterParams of_u, of_v;   // du = (D*x)^T q, dv = dy^T z
  bool base = true;         // whether there is a w
  bool outside = false;
  void* factor = nullptr;  // outside: (K, R) for u packed; shrink.z is the caller's, too
  bool want_x, want_u, want_sigma, want_v, want_p;
};

// Into the workspace, or where the caller has its place.
inline PackedFactor packed_rows(const Matrix& f, int r, int size, Workspace& room, bool outside, void* place) {
  PackedFactor p{f.data, f.row_stride, f.col_stride, static_cast<int>(f.rows), f.dtype, true};
  p.out_stride = padded(r);
  p.out = outside ? place : room.take<char>(f.rows * p.out_stride * size);
  return p;
}

inline PackedFactor packed_columns(const Matrix& f, int r, int size, Workspace& room) {
  PackedFactor p{f.data, f.row_stride, f.col_stride, static_cast<int>(f.rows), f.dtype, false};
  p.out_stride = (f.rows + 7) / 8 * 8;
  p.out = room.take<char>(p.out_stride * padded(r) * size);
  return p;
}

inline Splits splits_in(int lines, int r, int depth, int size, int processors, Workspace& room, Counters& counters) {
  Splits s;
  s.splits = splits_of(lines, r, depth, size, processors);
  if (s.splits == 1) return s;
  s.partial = room.take<float>(static_cast<int64_t>(s.splits) * lines * padded(r));
  s.counters = counters.take(ceil_div(lines, tile_lines) * ceil_div(r, tile_ranks));
  return s;
}

inline Splits small_splits_in(const LinearParams& l, bool base, int processors, Workspace& room, Counters& counters) {
  Splits s;
  if (base) s.splits = small_splits_of(l.columns, l.depth, size_of(l.dtype), processors);
  if (s.splits == 1) return s;
  s.partial = room.take<float>(static_cast<int64_t>(s.splits) * l.rows * l.columns);
  s.counters = counters.take(ceil_div(l.columns, small_columns));
  return s;
}

// Two launches: a layer's product for few rows, z of the sums of (D*a) u.
inline cudaError_t run_few(const ShrinkParams& of_z, const LinearParams& l, const Matrix& in, const Matrix& out,
                           const Splits& splits, float* sums, const Counters& counters, cudaStream_t stream) {
  SmallShrinkParams s;
  s.a = of_z.a, s.a_stride = of_z.a_stride, s.rows = of_z.rows, s.width = of_z.width, s.factor = in;
  s.dtype = of_z.dtype, s.keep = of_z.keep, s.keep_scale = of_z.keep_scale;
  s.sums = sums, s.slices = small_slices_of(of_z.rows, of_z.width, of_z.r);
  s.control = counters.count ? counters.first : nullptr, s.counters = counters.count;
  const cudaError_t error = small_shrink_launch(s, stream);
  if (error != cudaSuccess) return error;
  SmallLinearParams p;
  p.a = l.a, p.a_stride = l.a_stride, p.rows = l.rows, p.depth = l.depth, p.columns = l.columns;
  p.w = l.w, p.w_stride = l.w_stride, p.w_trans = l.w_trans, p.sums = sums, p.slices = s.slices, p.factor = out;
  p.r = of_z.r, p.by = of_z.by, p.h = of_z.h, p.z = of_z.z, p.bias = l.bias, p.dtype = l.dtype, p.keep = l.keep;
  p.keep_scale = l.keep_scale, p.out = l.out, p.out_stride = l.out_stride, p.splits = splits;
  return small_linear_launch(p, stream);
}

inline float* sums_in(const ShrinkParams& s, Workspace& room) {
  return room.take<float>(static_cast<int64_t>(small_slices_of(s.rows, s.width, s.r)) * s.rows * s.r);
}

// Counters lie together, as many as are taken: what is asked for twice is the same both times.
template <class Take>
inline Counters counters_in(Workspace& room, Take take) {
  Workspace nothing(nullptr);
  Counters counting;
  take(nothing, counting);
  Counters counters{room.take<int>(counting.count)};
  take(room, counters);
  return counters;
}

inline cudaError_t run_layer(LayerForward l, Workspace& room, int processors, cudaStream_t stream) {
  ShrinkParams& s = l.shrink;
  const int size = size_of(s.dtype);
  if (s.rows <= small_rows && !l.outside) {
    float* sums = sums_in(s, room);
    Splits splits;
    const Counters counters = counters_in(
        room, [&](Workspace& in, Counters& c) { splits = small_splits_in(l.linear, l.base, processors, in, c); });
    if (room.counts()) return cudaSuccess;
    return run_few(s, l.linear, l.u, l.v, splits, sums, counters, stream);
  }
  PackParams pack;
  pack.factors[0] = packed_columns(l.u, s.r, size, room),
  pack.factors[1] = packed_rows(l.v, s.r, size, room, l.outside, l.factor);
  if (!l.outside) s.z = room.take<char>(static_cast<int64_t>(s.rows) * padded(s.r) * size);
  int* tickets = nullptr;
  const Counters counters = counters_in(room, [&](Workspace& in, Counters& c) {
    tickets = c.take(1 + ceil_div(s.rows, forward_rows));
    s.splits = splits_in(s.rows, s.r, s.width, size, processors, in, c);
  });
  if (room.counts()) return cudaSuccess;
  pack.r = s.r, pack.dtype = s.dtype, pack.control = counters.first, pack.counters = counters.count;
  s.factor = pack.factors[0].out, s.factor_stride = pack.factors[0].out_stride;
  l.linear.z = s.z, l.linear.factor = pack.factors[1].out;
  cudaError_t error = pack_launch(pack, stream);
  if (error != cudaSuccess) return error;
  if (l.base && !l.outside && forward_serves(l.linear)) {
    s.splits = {};
    return forward_launch({s, l.linear, tickets}, stream);
  }
  error = shrink_launch(s, stream);
  return error == cudaSuccess && !l.outside ? linear_launch(l.linear, stream) : error;
}

inline cudaError_t run_layer(LayerBackward l, Workspace& room, int processors, cudaStream_t stream) {
  ShrinkParams& s = l.shrink;
  const int size = size_of(s.dtype);
  const bool product = l.want_x || l.want_u || l.want_sigma || l.want_p || l.outside;
  const bool few = l.want_x && s.rows <= small_rows && !l.outside;
  float* sums = few ? sums_in(s, room) : nullptr;
  PackParams pack;
  if (product && !few)
    pack.factors[0] = packed_rows(l.u, s.r, size, room, l.outside, l.factor),
    pack.factors[1] = packed_columns(l.v, s.r, size, room);
  const int64_t of_z = static_cast<int64_t>(s.rows) * padded(s.r) * size;
  if (!l.outside) s.z = l.want_u || (l.want_x && !few) ? room.take<char>(of_z) : nullptr;
  l.modulate.z = l.want_v ? room.take<char>(of_z) : nullptr;
  if (l.want_sigma && !l.want_p) s.h = room.take<float>(static_cast<int64_t>(s.rows) * s.r);
  Splits small;
  const Counters counters = counters_in(room, [&](Workspace& in, Counters& c) {
    if (few) small = small_splits_in(l.linear, l.base, processors, in, c);
    if (product && !few) s.splits = splits_in(s.rows, s.r, s.width, size, processors, in, c);
    if (l.want_u) l.of_u.splits = splits_in(l.of_u.width, s.r, s.rows, size, processors, in, c);
    if (l.want_v) l.of_v.splits = splits_in(l.of_v.width, s.r, s.rows, size, processors, in, c);
    Splits& rows = l.modulate.splits;
    rows.splits = modulate_splits_of(s.rows);
    if (l.want_sigma && rows.splits > 1) {
      rows.partial = in.take<float>(static_cast<int64_t>(rows.splits) * s.r);
      rows.counters = c.take(ceil_div(s.r, 16));
    }
  });
  if (room.counts()) return cudaSuccess;
  int* const control = counters.count ? counters.first : nullptr;
  cudaError_t error = cudaSuccess;
  if (few) {
    error = run_few(s, l.linear, l.v, l.u, small, sums, counters, stream);
  } else if (product) {
    pack.r = s.r, pack.dtype = s.dtype, pack.control = control, pack.counters = counters.count;
    s.factor = pack.factors[1].out, s.factor_stride = pack.factors[1].out_stride;
    error = pack_launch(pack, stream);
    if (error == cudaSuccess) error = shrink_launch(s, stream);
    l.linear.z = s.z, l.linear.factor = pack.factors[0].out;
    if (error == cudaSuccess && l.want_x && !l.outside) error = linear_launch(l.linear, stream);
  } else {
    l.modulate.control = control, l.modulate.counters = counters.count;
  }
  l.modulate.p = s.h;
  if (error == cudaSuccess && (l.want_v || l.want_sigma)) error = modulate_launch(l.modulate, stream);
  l.of_u.q = s.z, l.of_v.q = l.modulate.z;
  if (error == cudaSuccess && l.want_u) error = outer_launch(l.of_u, stream);
  if (error == cudaSuccess && l.want_v) error = outer_launch(l.of_v, stream);
  return error;
}

}  // namespace svdkern::cuda
