// The primitives on their own (shrink, outer, linear, dropout), and which kernels a number of rows takes.
#pragma once

#include "gram_amx.h"
#include "large_m.h"
#include "normal.h"
#include "normal_amx.h"
#include "sketch.h"

namespace svdkern {
namespace {

// Up to so many rows w is streamed as it lies: packing it would cost more.
template <class T>
constexpr int64_t few_rows = EngineOf<T>::Type::few_rows;

template <class T>
inline void shrink_as(const ShrinkParams& p) {
  const int64_t rows = p.a.rows, length = p.a.cols, r = p.f.cols;
  Scratch scratch;
  if (rows > few_rows<T>) {
    FusedJob job;
    job.a = p.a, job.e = by_rows(p.f), job.r = r, job.drop_a = p.dropout;
    job.h = p.out;
    job.parallel_for = p.parallel_for, job.threads = p.threads;
    if (r != 0) Fused<T>(job).run([](int64_t, int64_t, const float*, float*) {});
    return;
  }
  const int64_t chunk = chunk_of(length), chunks = chunks_of(length);
  float* partial = scratch.take<float>(chunks * rows * r);
  parallel(p.parallel_for, chunks, rows * r * smaller(chunk, length), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c)
      contract_all<T>(p.a, p.dropout, p.f, c * chunk, smaller(length, (c + 1) * chunk), partial + c * rows * r);
  });
  add_chunks(partial, chunks, rows * r, p.out);
}

template <class T>
inline void outer_as(const OuterParams& p) {
  const float* q = static_cast<const float*>(p.q.data);
  const int64_t units = (p.a.cols + unit - 1) / unit;
  Scratch scratch;
  const bool many = p.a.rows > few_rows<T>;
  const Outer<T> outer(p.a, p.dropout, q, p.out, p.parallel_for, scratch);
  parallel(p.parallel_for, units, p.a.rows * unit * p.out.cols, [&](int64_t begin, int64_t end) {
    const int64_t l0 = begin * unit, l1 = smaller(p.a.cols, end * unit);
    many ? outer.columns(l0, l1) : outer_range<T>(p.a, p.dropout, q, p.out, l0, l1);
  });
}

template <class T>
inline void dropout_as(const DropoutParams& p) {
  parallel(p.parallel_for, p.x.rows, 4 * p.x.cols, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const T* x = static_cast<const T*>(p.x.data) + m * p.x.row_stride;
      T* out = static_cast<T*>(p.out.data) + m * p.out.row_stride;
      for (int64_t c = 0; c < p.x.cols; c += mask_columns) {
        alignas(64) float keep[mask_columns];
        mask_row(p.dropout, m, c, keep);
        for (int64_t i = c; i < smaller(c + mask_columns, p.x.cols); i += W) {
          const int64_t n = smaller<int64_t>(W, p.x.cols - i);
          store(out + i, masked(load(x + i, n), load(keep + i - c)), n);
        }
      }
    }
  });
}

template <class T>
inline void linear_as(const LinearParams& p) {
  const int64_t rows = p.a.rows, r = p.z.data == nullptr ? 0 : p.z.cols;
  const float* z = static_cast<const float*>(p.z.data);
  Scratch scratch;
  if (rows > few_rows<T>) {
    FusedJob job;
    job.a = p.a, job.w = by_rows(p.w);
    if (r != 0) job.f = by_columns(p.f), job.z = const_cast<float*>(z);
    job.out = p.out.cols, job.r = r;
    job.drop_y = p.dropout, job.bias = p.bias, job.y = p.out;
    job.parallel_for = p.parallel_for, job.threads = p.threads;
    return Fused<T>(job).run([](int64_t, int64_t, const float*, float*) {});
  }
  Linear<T> job;
  job.rows = rows, job.in = p.a.cols, job.out = p.out.cols;
  base_operand(job, p.w, false);
  if (r != 0) set_adapter(job, z, p.f, scratch), job.dropout = p.dropout;
  job.bias = p.bias;
  job.y = static_cast<T*>(p.out.data), job.ldy = p.out.row_stride;
  take_operand(job, p.a, scratch);
  fill_operand(job, p.a, 0, job.in);
  const int64_t units = (job.out + unit - 1) / unit;
  parallel(p.parallel_for, units, job.rows * smaller(unit, job.out) * job.in,
           [&](int64_t begin, int64_t end) { linear_range(job, begin * unit, smaller(job.out, end * unit)); });
}

template <class T>
inline void normal_as(const NormalParams& p) {
  if (p.a.rows == 0) std::memset(p.z, 0, p.a.cols * p.x.cols * sizeof(float));
  if (p.a.rows == 0 || p.x.cols == 0) return;
#if defined(__AMX_BF16__)
  if constexpr (!same_type<T, f16>)
    if (p.rough && p.a.col_stride == 1) return RoughNormalPass<T>(p).run();
#endif
  NormalPass(p).run<T>();
}

template <class T>
inline void forward_as(const ForwardParams& p) {
  p.x.rows <= few_rows<T> ? forward_of_few<T>(p) : forward_of_many<T>(p);
}

template <class T>
inline void backward_as(const BackwardParams& p) {
  p.dy.rows <= few_rows<T> ? backward_of_few<T>(p) : backward_of_many<T>(p);
}

#if defined(__AMX_BF16__)
constexpr void (*gram)(const GramParams&) = [](const GramParams& p) { GramPass(p).run(); };
#else
constexpr void (*gram)(const GramParams&) = nullptr;
#endif

// The table of this file's instruction set; storage types are dispatched here, once a call.
constexpr Kernels kernels_named(const char* name, void (*residual)(const ResidualParams&)) {
  return {
      name,
      [](const ForwardParams& p) { with_type(p.x.dtype, [&](auto t) { forward_as<decltype(t)>(p); }); },
      [](const BackwardParams& p) { with_type(p.dy.dtype, [&](auto t) { backward_as<decltype(t)>(p); }); },
      [](const ShrinkParams& p) { with_type(p.a.dtype, [&](auto t) { shrink_as<decltype(t)>(p); }); },
      [](const OuterParams& p) { with_type(p.a.dtype, [&](auto t) { outer_as<decltype(t)>(p); }); },
      [](const DropoutParams& p) { with_type(p.x.dtype, [&](auto t) { dropout_as<decltype(t)>(p); }); },
      [](const LinearParams& p) { with_type(p.a.dtype, [&](auto t) { linear_as<decltype(t)>(p); }); },
      [](const NormalParams& p) { with_type(p.a.dtype, [&](auto t) { normal_as<decltype(t)>(p); }); },
      [](const EnergyParams& p) { with_type(p.a.dtype, [&](auto t) { energy_as<decltype(t)>(p); }); },
      [](const SketchParams& p) { p.out.dtype == DType::f64 ? sketch_as<double>(p) : sketch_as<float>(p); },
      residual,
      gram,
      philox_bits,
  };
}

}  // namespace
}  // namespace svdkern
