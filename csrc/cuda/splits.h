// Sums cut into pieces by CTA: every CTA stores its piece, and whoever comes last adds all of them up in their order,
// its own too, read back from memory. Who comes last changes no bit.
#pragma once

#include "params.h"
#include "ptx/atom.h"

namespace svdkern::cuda {

// Publishes what this CTA has stored; whether it is the last of `count` to do so, and then sees what all of them
// stored.
__device__ inline bool last_to_publish(int* counter, int count) {
  __shared__ bool last;
  __syncthreads();  // all of the CTA's stores come before the release by one thread
  if (threadIdx.x == 0) last = ptx::atom_add_acq_rel_gpu(counter, 1) == count - 1;
  __syncthreads();
  return last;
}

}  // namespace svdkern::cuda
