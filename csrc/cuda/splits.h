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

// The sum over all splits in place of this split's piece of an output tile; false where another CTA makes it. A split's
// piece of all tiles is `size` floats; each(what) calls what(place in it, value) for every element that this thread has
// of the tile.
template <class Each>
__device__ inline bool add_splits(const Splits& splits, int split, int tile, int64_t size, Each each) {
  if (splits.splits == 1) return true;
  each([&](int64_t at, float& value) { splits.partial[split * size + at] = value; });
  if (!last_to_publish(splits.counters + tile, splits.splits)) return false;
  each([&](int64_t at, float& value) {
    float sum = 0.0f;
    for (int s = 0; s < splits.splits; ++s) sum += splits.partial[s * size + at];
    value = sum;
  });
  __syncthreads();
  return true;
}

}  // namespace svdkern::cuda
