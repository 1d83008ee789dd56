// Counters in global memory by which CTAs tell each other: a load that sees what was stored before a release, and an
// add that releases.
#pragma once

namespace svdkern::ptx {

__device__ inline int ld_acquire_gpu(const int* counter) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(__cvta_generic_to_global(counter)) : "memory");
  return value;
}

// By the threads that `does` names: predicated, so that a warp stays whole, which a jump over it may part until the
// next barrier.
__device__ inline void red_add_release_gpu(int* counter, int value, bool does) {
  asm volatile("{ .reg .pred does; setp.ne.s32 does, %2, 0; @does red.release.gpu.global.add.s32 [%0], %1; }" ::"l"(
                   __cvta_generic_to_global(counter)),
               "r"(value), "r"(static_cast<int>(does))
               : "memory");
}

}  // namespace svdkern::ptx
