// A barrier of some of a CTA's warps: `threads` of them in all, by a number of its own, 1 to 15.
#pragma once

namespace svdkern::ptx {

__device__ inline void bar_sync(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

}  // namespace svdkern::ptx
