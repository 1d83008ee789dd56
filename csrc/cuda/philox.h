// The dropout mask D on the GPU: the bits of csrc/cpu/philox.h, made again wherever they are needed.
//
//   key = (seed_lo, seed_hi)   counter = (row, col / 8, offset_lo, offset_hi)   Philox4x32, 7 rounds
//   bits(row, col) = half j % 2 (low half first) of output word j / 2, j = col % 8       D = bits >= t ? 1 / (1 - t /
//   65536) : 0
//
// An octet of columns is one call: 14 wide multiplies for 8 elements. Word j / 2 has the halves of elements j and j + 1
// where a 16-byte chunk of a 16-bit type has the elements, so a mask is two selects and an and for two elements.
// Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once

#include "element.h"

namespace svdkern::cuda {

struct Philox {
  uint32_t seed[2], offset[2], threshold;

  __device__ explicit Philox(const Keep& keep) : seed(), offset(), threshold(keep.threshold) {
    if (threshold == 0) return;
    const uint64_t s = keep.rng_state[0], o = keep.rng_state[1];
    seed[0] = static_cast<uint32_t>(s), seed[1] = static_cast<uint32_t>(s >> 32);
    offset[0] = static_cast<uint32_t>(o), offset[1] = static_cast<uint32_t>(o >> 32);
  }

  // The 16 random bits of eight elements: columns 8 octet ... of a row.
  __device__ uint4 bits(uint32_t row, uint32_t octet) const {
    uint32_t c0 = row, c1 = octet, c2 = offset[0], c3 = offset[1], k0 = seed[0], k1 = seed[1];
#pragma unroll
    for (int round = 0; round < 7; ++round) {
      const uint64_t p0 = static_cast<uint64_t>(c0) * 0xD2511F53u, p1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
      c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0, c1 = static_cast<uint32_t>(p1);
      c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1, c3 = static_cast<uint32_t>(p0);
      k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    return {c0, c1, c2, c3};
  }

  // All ones in the halves whose element survives.
  __device__ uint32_t kept_halves(uint32_t word) const {
    return ((word & 0xffffu) >= threshold ? 0xffffu : 0u) | ((word >> 16) >= threshold ? 0xffff0000u : 0u);
  }

  // Which elements of a warp's sums survive, of rows g and columns 8 j + 2 t and the next for j = 0 ... 3 (product.h):
  // words[j], its low half for the first. The four lanes of a row make an octet each and hand each other the word that
  // is theirs.
  __device__ void words_of_sums(uint32_t (&words)[4], uint32_t row, uint32_t octet0) const {
    const int t = threadIdx.x % 4;
    const uint4 b = bits(row, octet0 + t);
    const uint32_t mine[4] = {b.x, b.y, b.z, b.w};
    uint32_t got[4];  // got[s]: from lane t ^ s, of octet t ^ s
#pragma unroll
    for (int s = 0; s < 4; ++s) got[s] = __shfl_xor_sync(~0u, pick(mine, t ^ s), s);
#pragma unroll
    for (int j = 0; j < 4; ++j) words[j] = pick(got, t ^ j);
  }

  __device__ static uint32_t pick(const uint32_t (&of)[4], int i) {
    return i & 2 ? (i & 1 ? of[3] : of[2]) : (i & 1 ? of[1] : of[0]);
  }

  // A chunk of a row, its first column a multiple of its length: what is dropped becomes zero, whatever it was.
  template <class T>
  __device__ void drop(uint4& chunk, int row, int column) const {
    const uint4 b = bits(row, column / 8);
    if constexpr (sizeof(T) == 2) {
      chunk.x &= kept_halves(b.x), chunk.y &= kept_halves(b.y);
      chunk.z &= kept_halves(b.z), chunk.w &= kept_halves(b.w);
    } else {
      const uint32_t low = column % 8 ? b.z : b.x, high = column % 8 ? b.w : b.y;
      chunk.x &= (low & 0xffffu) >= threshold ? ~0u : 0u, chunk.y &= (low >> 16) >= threshold ? ~0u : 0u;
      chunk.z &= (high & 0xffffu) >= threshold ? ~0u : 0u, chunk.w &= (high >> 16) >= threshold ? ~0u : 0u;
    }
  }
};

}  // namespace svdkern::cuda
