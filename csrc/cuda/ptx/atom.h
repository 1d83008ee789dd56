// Adds to a counter in global memory that other CTAs look at, and returns what it was. Stores ordered before it are
// visible to who sees it move, and theirs to this thread.
#pragma once

namespace svdkern::ptx {

__device__ inline int atom_add_acq_rel_gpu(int* counter, int value) {
  int old;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;"
               : "=r"(old)
               : "l"(__cvta_generic_to_global(counter)), "r"(value)
               : "memory");
  return old;
}

}  // namespace svdkern::ptx
