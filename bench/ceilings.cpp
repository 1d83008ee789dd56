// What one core of this CPU can do at most, for ceilings.py: products in registers, and reads of a buffer.
// Every function returns something that depends on its work, so that none of it can be left out.
#include <immintrin.h>

#include <cstdint>

namespace {
constexpr int chains = 12;  // more independent sums than latency times throughput of any product here
}

extern "C" {

// A product is added to each of 12 sums in registers a turn: 2 * 12 * width flop, bf16 pairs twice that.
#define SUMS_IN_REGISTERS(name, isa, Sums, zero, Factors, one, product)         \
  __attribute__((target(isa))) float name(int64_t turns) {                      \
    Sums sum[chains];                                                           \
    Factors a = one, b = one;                                                   \
    for (auto& s : sum) s = zero;                                               \
    for (int64_t i = 0; i < turns; ++i) {                                       \
      _Pragma("GCC unroll 12") for (int j = 0; j < chains; ++j) product;        \
      asm volatile("" : "+v"(a), "+v"(b)); /* keeps the products in the loop */ \
    }                                                                           \
    float total = 0;                                                            \
    for (auto& s : sum) total += reinterpret_cast<const float&>(s);             \
    return total;                                                               \
  }

SUMS_IN_REGISTERS(fma_avx2, "avx2,fma", __m256, _mm256_setzero_ps(), __m256, _mm256_set1_ps(1.0f),
                  sum[j] = _mm256_fmadd_ps(a, b, sum[j]))
SUMS_IN_REGISTERS(fma_avx512, "avx512f", __m512, _mm512_setzero_ps(), __m512, _mm512_set1_ps(1.0f),
                  sum[j] = _mm512_fmadd_ps(a, b, sum[j]))
SUMS_IN_REGISTERS(fma_avx512_bf16, "avx512f,avx512bf16", __m512, _mm512_setzero_ps(), __m512i,
                  _mm512_set1_epi32(0x3f803f80), sum[j] = _mm512_dpbf16_ps(sum[j], (__m512bh)a, (__m512bh)b))

// 4 tiles of 16 x 16 x 32 a turn. The process must have asked for the tiles' state (PyTorch does).
__attribute__((target("amx-tile,amx-bf16"))) float fma_amx_bf16(int64_t turns) {
  struct alignas(64) {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } shapes;
  alignas(64) float out[256] = {};
  _tile_loadconfig(&shapes);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, out, 64);
  _tile_loadd(5, out, 64);
  _tile_loadd(6, out, 64);
  _tile_loadd(7, out, 64);
  for (int64_t i = 0; i < turns; ++i) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, out, 64);
  _tile_release();
  return out[0];
}

// In 8 streams, fetched ahead: one stream alone waits for the page tables every 4 KB.
__attribute__((target("avx2"))) int64_t read_all(const void* from, int64_t bytes) {
  constexpr int streams = 8;
  const int64_t part = bytes / streams / 128 * 128;
  __m256i sum[4] = {};
  for (int64_t i = 0; i < part; i += 128)
    for (int s = 0; s < streams; ++s) {
      const char* p = static_cast<const char*>(from) + s * part + i;
      __builtin_prefetch(p + 1024, 0, 2);
      __builtin_prefetch(p + 1088, 0, 2);
      for (int j = 0; j < 4; ++j)
        sum[j] = _mm256_xor_si256(sum[j], _mm256_load_si256(reinterpret_cast<const __m256i*>(p) + j));
    }
  return _mm256_extract_epi64(sum[0], 0) ^ _mm256_extract_epi64(sum[1], 0) ^ _mm256_extract_epi64(sum[2], 0) ^
         _mm256_extract_epi64(sum[3], 0);
}

}  // extern "C"
