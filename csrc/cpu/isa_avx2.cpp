// AVX2, FMA and F16C: every x86-64 CPU since 2013 to 2015 (x86-64-v3).
#include "isa.h"
#include "primitives.h"

namespace svdkern {

extern const Kernels avx2_kernels = kernels_named("avx2", residual_avx2);

}  // namespace svdkern
