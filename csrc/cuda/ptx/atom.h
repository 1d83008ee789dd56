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

// The same for what nobody is to see the stores of, a ticket; by the threads that `does` names (flag.h), 0 for others.
__device__ inline int atom_add_relaxed_gpu(int* counter, int value, bool does) {
  int old;
  asm volatile(
      "{ .reg .pred does; setp.ne.s32 does, %3, 0; mov.s32 %0, 0; "
      "@does atom.relaxed.gpu.global.add.s32 %0, [%1], %2; }"
      : "=&r"(old)
      : "l"(__cvta_generic_to_global(counter)), "r"(value), "r"(static_cast<int>(does))
      : "memory");
  return old;
}

}  // namespace svdkern::ptx
