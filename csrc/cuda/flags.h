// What CTAs of one launch tell each other: a counter of those that have stored their part.
#pragma once

#include "ptx/flag.h"

namespace svdkern::cuda {

// What must have been counted before somebody reads; a null counter: nothing.
struct Awaited {
  const int* counter = nullptr;
  int count = 0;

  // One thread waits; a barrier must stand between this and the others' reads.
  __device__ void look() const {
    if (counter && threadIdx.x == 0)
      while (ptx::ld_acquire_gpu(counter) < count) {
      }
  }
};

// All of this CTA's stores before here are seen by who sees the counter move.
__device__ inline void publish(int* counter) {
  __syncthreads();  // all of the CTA's stores come before the release by one thread
  ptx::red_add_release_gpu(counter, 1, threadIdx.x == 0);
}

}  // namespace svdkern::cuda
