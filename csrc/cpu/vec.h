// One float vector of W lanes and the three storage types, chosen by the flags of the file that includes this one.
// GCC/Clang vector extensions do the arithmetic (a * b + c is one FMA where the target has it: -ffp-contract=fast);
// intrinsics only where the extensions have no word for it: masks, half precision. (The maskz forms with a full mask
// are there because GCC 12 warns of its own headers' "undefined" pass-through operands in the plain ones.) Everything
// is in an unnamed namespace: each instruction set compiles its own copy and the linker can never mix them.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../svdkern.h"

namespace svdkern {
namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float F __attribute__((vector_size(4 * W)));
typedef uint32_t U32 __attribute__((vector_size(4 * W)));
typedef uint16_t U16 __attribute__((vector_size(2 * W)));
typedef float FUnaligned __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef uint16_t U16Unaligned __attribute__((vector_size(2 * W), aligned(2), may_alias));

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class A, class B>
constexpr bool same_type = false;
template <class A>
constexpr bool same_type<A, A> = true;

template <class T>
constexpr T smaller(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T larger(T a, T b) {
  return a < b ? b : a;
}
constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

inline F splat(float x) { return x - F{}; }

inline float sum(F v) {  // in halves, the same tree on every compiler
#if defined(__AVX512F__)
  struct Halves {
    __m256 low, high;
  };
  const Halves halves = bit_cast<Halves>(v);
  const __m256 v8 = halves.low + halves.high;
#elif defined(__AVX2__)
  const __m256 v8 = v;
#endif
#if defined(__AVX2__)
  const __m128 v4 = _mm256_castps256_ps128(v8) + _mm256_extractf128_ps(v8, 1);
  return (v4[0] + v4[2]) + (v4[1] + v4[3]);
#else
  return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}

// Upcasts are exact.
inline U32 zero_extended(U16 v) {  // GCC 12 makes two halves of the general expression
#if defined(__AVX512F__)
  return bit_cast<U32>(_mm512_maskz_cvtepu16_epi32(0xffff, bit_cast<__m256i>(v)));
#elif defined(__AVX2__)
  return bit_cast<U32>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(v)));
#else
  return __builtin_convertvector(v, U32);
#endif
}

inline F upcast(U16 v, bf16) { return bit_cast<F>(zero_extended(v) << 16); }

inline F upcast(U16 v, f16) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtph_ps(0xffff, bit_cast<__m256i>(v));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(bit_cast<__m128i>(v));
#else
  const U32 half = __builtin_convertvector(v, U32);
  const U32 magnitude = (half & 0x7fff) << 13;
  const F scaled = bit_cast<F>(magnitude) * 0x1p112f;  // rebias; also makes subnormals normal
  const U32 special = (U32)(magnitude >= 0x0f800000) & 0x7f800000;
  return bit_cast<F>(bit_cast<U32>(scaled) | special | ((half & 0x8000) << 16));
#endif
}

// Downcasts round to nearest even; NaN stays NaN.
inline U16 downcast(F v, bf16) {
  const U32 bits = bit_cast<U32>(v);
  const U32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const U32 is_nan = (U32)((bits & 0x7fffffff) > 0x7f800000);
  return __builtin_convertvector((is_nan & 0x7fc0) | (~is_nan & rounded), U16);
}

inline U16 downcast(F v, f16) {
#if defined(__AVX512F__)
  return bit_cast<U16>(_mm512_maskz_cvtps_ph(0xffff, v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  return bit_cast<U16>(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  const U32 bits = bit_cast<U32>(v), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  // Adding 0.5 lines a subnormal half's last place up with the float's: the addition rounds.
  const U32 subnormal = bit_cast<U32>(bit_cast<F>(magnitude) + 0.5f) - 0x3f000000;
  const U32 normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const U32 is_small = (U32)(magnitude < 0x38800000), is_large = (U32)(magnitude >= 0x47800000);
  const U32 is_nan = (U32)(magnitude > 0x7f800000);
  const U32 finite = (is_small & subnormal) | (~is_small & normal);
  return __builtin_convertvector(sign | (is_large & (0x7c00 | (is_nan & 0x0200))) | (~is_large & finite), U16);
#endif
}

inline F load(const float* p) { return *reinterpret_cast<const FUnaligned*>(p); }
template <class T>
inline F load(const T* p) {
  return upcast(*reinterpret_cast<const U16Unaligned*>(p), T{});
}

inline void store(float* p, F v) { *reinterpret_cast<FUnaligned*>(p) = v; }
template <class T>
inline void store(T* p, F v) {
  *reinterpret_cast<U16Unaligned*>(p) = downcast(v, T{});
}

// The first n lanes, 0 <= n <= W; the others are zero, and no byte beyond the n-th element is touched.
inline F load(const float* p, int64_t n) {
#if defined(__AVX512F__)
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
#else
  F v = {};
  std::memcpy(&v, p, 4 * n);
  return v;
#endif
}
template <class T>
inline F load(const T* p, int64_t n) {
  U16 v = {};
#if defined(__AVX512F__)
  v = bit_cast<U16>(_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), p));
#else
  std::memcpy(&v, p, 2 * n);
#endif
  return upcast(v, T{});
}
inline void store(float* p, F v, int64_t n) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), v);
#else
  std::memcpy(p, &v, 4 * n);
#endif
}
template <class T>
inline void store(T* p, F v, int64_t n) {
  const U16 half = downcast(v, T{});
#if defined(__AVX512F__)
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1), bit_cast<__m256i>(half));
#else
  std::memcpy(p, &half, 2 * n);
#endif
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(f16 x) { return load(&x, 1)[0]; }
inline void from_float(float* p, float x) { *p = x; }
template <class T>
inline void from_float(T* p, float x) {
  store(p, splat(x), 1);
}

// v[i][k] <-> v[k][i] in log2(W) rounds of exchanging blocks.
template <int S>
inline void exchange(F (&v)[W]) {
  U32 low, high;
  for (int k = 0; k < W; ++k) {
    low[k] = k & S ? W + k - S : k;
    high[k] = k & S ? W + k : k + S;
  }
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) {
    if (i & S) continue;
    const F a = v[i], b = v[i + S];
#if defined(__clang__)
    F x, y;
    for (int k = 0; k < W; ++k) {
      x[k] = k & S ? b[k - S] : a[k];
      y[k] = k & S ? b[k] : a[k + S];
    }
    v[i] = x, v[i + S] = y;
#else
    v[i] = __builtin_shuffle(a, b, low);
    v[i + S] = __builtin_shuffle(a, b, high);
#endif
  }
}
inline void transpose(F (&v)[W]) {
  exchange<1>(v);
  exchange<2>(v);
  if constexpr (W > 4) exchange<4 % W>(v);
  if constexpr (W > 8) exchange<8 % W>(v);
}

inline void scale_by(float scale, const float* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = scale * from[i];
}

// Calls body(T{}) with the storage type that dtype names (f64 has no kernels here: the caller has checked).
template <class Body>
inline void with_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::bf16:
      return body(bf16{});
    case DType::f16:
      return body(f16{});
    default:
      return body(float{});
  }
}

}  // namespace
}  // namespace svdkern
