// out = W - sum_i v_i (s sigma_i u_i)^T, the residual that a saved adapter's initial factors leave, exactly:
//
//   a_i = fl64(fl64(s sigma_i) u_i);   acc = W;   for i = 0 ... r - 1: acc = fl64(acc - fl64(v_i a_i));   out =
//   round(acc)
//
// The order and the roundings are the definition: any instruction set, thread count or device that follows them gives
// the same bits, so this file is compiled without FMA (-ffp-contract=off) and for the baseline only. weight (N, K), u
// (K, r), v (N, r). Layout: rows of W in parallel, columns in panels of 512 whose a (r, 512) is made once for a range
// of rows. Floor: 2 N K r fp64 operations.
#include <cmath>
#include <cstring>
#include <new>

#include "../svdkern.h"

namespace svdkern {
namespace {

constexpr int64_t panel = 512;

float bf16_to_float(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

double f16_to_double(uint16_t half) {
  const int exponent = half >> 10 & 31, mantissa = half & 1023;
  const double magnitude = exponent == 31  ? (mantissa ? NAN : INFINITY)
                           : exponent == 0 ? std::ldexp(mantissa, -24)
                                           : std::ldexp(mantissa + 1024, exponent - 25);
  return half & 0x8000 ? -magnitude : magnitude;
}

double get(DType dtype, const void* data, int64_t i) {
  switch (dtype) {
    case DType::f64:
      return static_cast<const double*>(data)[i];
    case DType::bf16:
      return bf16_to_float(static_cast<const uint16_t*>(data)[i]);
    case DType::f16:
      return f16_to_double(static_cast<const uint16_t*>(data)[i]);
    default:
      return static_cast<const float*>(data)[i];
  }
}

// One rounding to nearest even, straight from double (through float there would be two) to a half-width format with
// `mantissa_bits` explicit bits and the given least normal exponent.
uint16_t round_to_half(double x, int mantissa_bits, int least_exponent, int greatest_exponent) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const uint16_t infinity = static_cast<uint16_t>((greatest_exponent - least_exponent + 2) << mantissa_bits);
  const double magnitude = std::fabs(x);
  if (std::isnan(x)) return static_cast<uint16_t>(sign | infinity | 1 << (mantissa_bits - 1));
  if (std::isinf(x)) return sign | infinity;
  if (magnitude == 0.0) return sign;
  int exponent;
  std::frexp(magnitude, &exponent);  // magnitude = [0.5, 1) 2^exponent
  exponent = exponent - 1 < least_exponent ? least_exponent : exponent - 1;
  // exact scaling, then an integer below 2^(mantissa_bits + 1): nearbyint rounds to nearest even
  const int64_t steps = static_cast<int64_t>(std::nearbyint(std::ldexp(magnitude, mantissa_bits - exponent)));
  // a subnormal, or a carry out of the mantissa, lands on the right code by this one addition
  const int64_t code = (static_cast<int64_t>(exponent - least_exponent) << mantissa_bits) + steps;
  return sign | (code > infinity ? infinity : static_cast<uint16_t>(code));
}

void put(DType dtype, void* data, int64_t i, double x) {
  switch (dtype) {
    case DType::f64:
      static_cast<double*>(data)[i] = x;
      break;
    case DType::bf16:
      static_cast<uint16_t*>(data)[i] = round_to_half(x, 7, -126, 127);
      break;
    case DType::f16:
      static_cast<uint16_t*>(data)[i] = round_to_half(x, 10, -14, 15);
      break;
    default:
      static_cast<float*>(data)[i] = static_cast<float>(x);
  }
}

void rows_of(const ResidualParams& p, int64_t n0, int64_t n1) {
  const int64_t r = p.u.cols, cols = p.weight.cols;
  double* a = new double[r * panel];
  double acc[panel];
  for (int64_t k0 = 0; k0 < cols; k0 += panel) {
    const int64_t width = cols - k0 < panel ? cols - k0 : panel;
    for (int64_t i = 0; i < r; ++i) {
      const double sigma = p.sigma.data ? get(p.sigma.dtype, p.sigma.data, i * p.sigma.stride) : 1.0;
      const double scaled = p.scale * sigma;
      for (int64_t k = 0; k < width; ++k)
        a[i * panel + k] = scaled * get(p.u.dtype, p.u.data, (k0 + k) * p.u.row_stride + i * p.u.col_stride);
    }
    for (int64_t n = n0; n < n1; ++n) {
      const int64_t row = n * p.weight.row_stride;
      for (int64_t k = 0; k < width; ++k)
        acc[k] = get(p.weight.dtype, p.weight.data, row + (k0 + k) * p.weight.col_stride);
      for (int64_t i = 0; i < r; ++i) {
        const double v = get(p.v.dtype, p.v.data, n * p.v.row_stride + i * p.v.col_stride);
        const double* ai = a + i * panel;
        for (int64_t k = 0; k < width; ++k) acc[k] = acc[k] - v * ai[k];
      }
      for (int64_t k = 0; k < width; ++k)
        put(p.out.dtype, p.out.data, n * p.out.row_stride + (k0 + k) * p.out.col_stride, acc[k]);
    }
  }
  delete[] a;
}

}  // namespace

void residual(const ResidualParams& p) {
  if (p.weight.rows == 0 || p.weight.cols == 0) return;
  p.parallel_for(
      0, p.weight.rows, 1 + (1 << 16) / (p.weight.cols * (p.u.cols + 1)),
      [](int64_t begin, int64_t end, void* context) {
        rows_of(*static_cast<const ResidualParams*>(context), begin, end);
      },
      const_cast<ResidualParams*>(&p));
}

}  // namespace svdkern
