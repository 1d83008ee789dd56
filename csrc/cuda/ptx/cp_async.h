// Copies from global to shared memory that go on by themselves: 16 bytes each, of which the first `bytes` are read and
// the rest is zeros. A thread waits for its own: until at most N of the groups it committed are still open.
#pragma once

#include <cstdint>

namespace svdkern::ptx {

__device__ inline void cp_async_16(uint32_t shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(__cvta_generic_to_global(global)),
               "r"(bytes)
               : "memory");
}

// All 16 bytes; what the L2 lacks, it fetches as 128 of a line, for neighbours that ask for the rest.
__device__ inline void cp_async_16(uint32_t shared, const void* global) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(shared), "l"(__cvta_generic_to_global(global))
               : "memory");
}

__device__ inline void cp_async_commit_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int N>
__device__ inline void cp_async_wait_group() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

}  // namespace svdkern::ptx
