// out = W - sum_i v_i (s sigma_i u_i)^T, the residual that a saved adapter's initial factors leave, exactly:
//
//   a_i = fl64(fl64(s sigma_i) u_i);   acc = W;   for i = 0 ... r - 1: acc = fl64(acc - fl64(v_i a_i));   out =
//   round(acc)
//
// The order and the roundings are the definition: any instruction set, thread count or device that follows them gives
// the same bits. So the files that include this one are compiled without FMA (-ffp-contract=off), apart from the other
// kernels. weight (N, K), u (K, r), v (N, r).
//
// Layout: rows of W in parallel, columns in panels of 256 whose a (r, 256) is made once for a range of rows (32 KB at
// r = 16, in the L1); a tile of 2 rows by 2 W columns stays in registers for all of r. Floor: 2 N K r fp64 operations,
// which cannot be fused.
#pragma once

#include <cmath>
#include <cstring>

#include "parallel.h"
#include "scratch.h"

namespace svdkern {
namespace {

typedef float Half __attribute__((vector_size(2 * W)));
typedef double D __attribute__((vector_size(4 * W)));
typedef uint64_t U64 __attribute__((vector_size(4 * W)));
typedef double DUnaligned __attribute__((vector_size(4 * W), aligned(8), may_alias));

struct Halves {
  Half half[2];
};

inline D splat64(double x) { return x - D{}; }

// W elements in fp64, those beyond the n-th zero.
struct Wide {
  D part[2];
};

template <class T>
inline Wide load_wide(const T* p, int64_t n) {
  Wide wide;
  if constexpr (same_type<T, double>) {
    double lanes[W] = {};
    std::memcpy(lanes, p, 8 * n);
    wide = bit_cast<Wide>(lanes);
  } else {
    const Halves halves = bit_cast<Halves>(n == W ? load(p) : load(p, n));
    for (int h = 0; h < 2; ++h) wide.part[h] = __builtin_convertvector(halves.half[h], D);
  }
  return wide;
}

// A half's format: explicit bits of the mantissa, the least normal exponent and the greatest.
template <class T>
struct Format {
  static constexpr int bits = 7, least = -126, greatest = 127;
};
template <>
struct Format<f16> {
  static constexpr int bits = 10, least = -14, greatest = 15;
};

// One rounding to nearest even, straight from double (through float there would be two), for any value.
template <class T>
uint16_t round_to_half(double x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  constexpr int bits = Format<T>::bits, least = Format<T>::least;
  constexpr uint16_t infinity = static_cast<uint16_t>((Format<T>::greatest - least + 2) << bits);
  const double magnitude = std::fabs(x);
  if (std::isnan(x)) return static_cast<uint16_t>(sign | infinity | 1 << (bits - 1));
  if (std::isinf(x)) return sign | infinity;
  if (magnitude == 0.0) return sign;
  int exponent;
  std::frexp(magnitude, &exponent);  // magnitude = [0.5, 1) 2^exponent
  exponent = exponent - 1 < least ? least : exponent - 1;
  // exact scaling, then an integer below 2^(bits + 1): nearbyint rounds to nearest even
  const int64_t steps = static_cast<int64_t>(std::nearbyint(std::ldexp(magnitude, bits - exponent)));
  // a subnormal, or a carry out of the mantissa, lands on the right code by this one addition
  const int64_t code = (static_cast<int64_t>(exponent - least) << bits) + steps;
  return sign | (code > infinity ? infinity : static_cast<uint16_t>(code));
}

// As above, by integers, for zeros and normal numbers: what it returns is a value of the format (or its infinity), so
// that the conversions after it are exact. `odd` gets bits where x is something else.
template <class T>
inline D round_normal(D x, U64& odd) {
  constexpr int dropped = 52 - Format<T>::bits;
  const U64 bits = bit_cast<U64>(x);
  const D magnitude = bit_cast<D>(bits & ~(uint64_t{1} << 63));
  const U64 normal = (U64)(magnitude >= splat64(std::ldexp(1.0, Format<T>::least))) &
                     (U64)(magnitude < splat64(std::ldexp(1.0, Format<T>::greatest + 1)));
  odd |= ~(normal | (U64)(magnitude == D{}));
  const U64 rounded = bits + ((uint64_t{1} << (dropped - 1)) - 1) + ((bits >> dropped) & 1);
  return bit_cast<D>(rounded & ~((uint64_t{1} << dropped) - 1));
}

template <class T>
inline void store_rounded(T* p, const Wide& wide, int64_t n) {
  if constexpr (same_type<T, double>) {
    std::memcpy(p, &wide, 8 * n);
  } else {
    Halves halves;
    U64 odd = {};
    for (int h = 0; h < 2; ++h) {
      D x = wide.part[h];
      if constexpr (!same_type<T, float>) x = round_normal<T>(x, odd);
      halves.half[h] = __builtin_convertvector(x, Half);
    }
    const F rounded = bit_cast<F>(halves);
    n == W ? store(p, rounded) : store(p, rounded, n);
    if constexpr (!same_type<T, float>) {
      uint64_t any = 0;
      for (int i = 0; i < W / 2; ++i) any |= odd[i];
      if (any == 0) return;
      double lanes[W];
      std::memcpy(lanes, &wide, sizeof(lanes));
      for (int64_t i = 0; i < n; ++i) p[i].bits = round_to_half<T>(lanes[i]);
    }
  }
}

// Calls body(T{}) with any type that a matrix here may have.
template <class Body>
inline void with_type64(DType dtype, const Body& body) {
  dtype == DType::f64 ? body(double{}) : with_type(dtype, body);
}

inline double to_double(double x) { return x; }
template <class T>
inline double to_double(T x) {
  return to_float(x);
}

inline void widen(DType dtype, const void* data, int64_t first, int64_t stride, int64_t n, double* out) {
  with_type64(dtype, [&](auto type) {
    const auto* from = static_cast<const decltype(type)*>(data) + first;
    for (int64_t i = 0; i < n; ++i) out[i] = to_double(from[i * stride]);
  });
}

class ResidualRows {
 public:
  explicit ResidualRows(const ResidualParams& p) : p_(p), rank_(p.u.cols) {}

  void run(int64_t n0, int64_t n1) {
    Scratch scratch;
    a_ = scratch.take<double>(rank_ * panel);
    v_ = scratch.take<double>(2 * rank_);
    double* scaled = scratch.take<double>(rank_);
    for (int64_t i = 0; i < rank_; ++i) scaled[i] = 1.0;
    if (p_.sigma.data) widen(p_.sigma.dtype, p_.sigma.data, 0, p_.sigma.stride, rank_, scaled);
    for (int64_t i = 0; i < rank_; ++i) scaled[i] = p_.scale * scaled[i];
    for (int64_t k0 = 0; k0 < p_.weight.cols; k0 += panel) {
      const int64_t width = smaller(panel, p_.weight.cols - k0);
      for (int64_t i = 0; i < rank_; ++i) {
        double* row = a_ + i * panel;
        widen(p_.u.dtype, p_.u.data, k0 * p_.u.row_stride + i * p_.u.col_stride, p_.u.row_stride, width, row);
        for (int64_t k = 0; k < width; ++k) row[k] = scaled[i] * row[k];
        for (int64_t k = width; k < panel; ++k) row[k] = 0;
      }
      with_type64(p_.weight.dtype, [&](auto type) {
        for (int64_t n = n0; n < n1; n += 2)
          n + 1 < n1 ? rows<decltype(type), 2>(n, k0, width) : rows<decltype(type), 1>(n, k0, width);
      });
    }
  }

 private:
  static constexpr int64_t panel = 256;

  template <class T, int R>
  void rows(int64_t n, int64_t k0, int64_t width) const {
    for (int m = 0; m < R; ++m)
      widen(p_.v.dtype, p_.v.data, (n + m) * p_.v.row_stride, p_.v.col_stride, rank_, v_ + m * rank_);
    for (int64_t k = 0; k < width; k += 2 * W) {
      Wide acc[R][2];
      for (int m = 0; m < R; ++m)
        for (int j = 0; j < 2; ++j) acc[m][j] = take<T>(n + m, k0 + k + j * W, lanes(width - k - j * W));
      subtract<R>(a_ + k, acc);
      for (int m = 0; m < R; ++m)
        for (int j = 0; j < 2; ++j) put<T>(n + m, k0 + k + j * W, lanes(width - k - j * W), acc[m][j]);
    }
  }

  static int64_t lanes(int64_t left) { return larger<int64_t>(0, smaller<int64_t>(W, left)); }

  template <int R>
  void subtract(const double* a, Wide (&acc)[R][2]) const {
    D sum[R][4];
    for (int m = 0; m < R; ++m)
      for (int j = 0; j < 4; ++j) sum[m][j] = acc[m][j / 2].part[j % 2];
    for (int64_t i = 0; i < rank_; ++i, a += panel)
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const D aj = *reinterpret_cast<const DUnaligned*>(a + j * (W / 2));
#pragma GCC unroll 2
        for (int m = 0; m < R; ++m) sum[m][j] = sum[m][j] - splat64(v_[m * rank_ + i]) * aj;
      }
    for (int m = 0; m < R; ++m)
      for (int j = 0; j < 4; ++j) acc[m][j / 2].part[j % 2] = sum[m][j];
  }

  template <class T>
  Wide take(int64_t n, int64_t k, int64_t count) const {
    const T* from = static_cast<const T*>(p_.weight.data) + n * p_.weight.row_stride + k * p_.weight.col_stride;
    if (p_.weight.col_stride == 1) return load_wide(from, count);
    double values[W] = {};
    for (int64_t i = 0; i < count; ++i) values[i] = to_double(from[i * p_.weight.col_stride]);
    return bit_cast<Wide>(values);
  }

  template <class T>
  void put(int64_t n, int64_t k, int64_t count, const Wide& wide) const {
    T* to = static_cast<T*>(p_.out.data) + n * p_.out.row_stride + k * p_.out.col_stride;
    if (p_.out.col_stride == 1) return store_rounded(to, wide, count);
    T values[W];
    store_rounded(values, wide, W);
    for (int64_t i = 0; i < count; ++i) to[i * p_.out.col_stride] = values[i];
  }

  const ResidualParams& p_;
  const int64_t rank_;
  double *a_ = nullptr, *v_ = nullptr;
};

inline void residual_of(const ResidualParams& p) {
  if (p.weight.rows == 0 || p.weight.cols == 0) return;
  parallel(p.parallel_for, p.weight.rows, p.weight.cols * (p.u.cols + 1),
           [&](int64_t begin, int64_t end) { ResidualRows(p).run(begin, end); });
}

}  // namespace
}  // namespace svdkern
