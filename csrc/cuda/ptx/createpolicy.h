// How the L2 is to treat a line: one that is read once is the first to go.
#pragma once

#include <cstdint>

namespace svdkern::ptx {

__device__ inline uint64_t createpolicy_evict_first() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

}  // namespace svdkern::ptx
