// AVX-512 F, BW, DQ and VL (x86-64-v4).
#include "isa.h"
#include "primitives.h"

namespace svdkern {

extern const Kernels avx512_kernels = kernels_named("avx512", residual_avx512);

}  // namespace svdkern
