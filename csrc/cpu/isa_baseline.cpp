// The portable kernels: SSE4.2 on x86-64 (x86-64-v2), Advanced SIMD on aarch64.
#include "isa.h"
#include "primitives.h"

namespace svdkern {

#if defined(__aarch64__)
extern const Kernels baseline_kernels = kernels_named("neon", residual_baseline);
#else
extern const Kernels baseline_kernels = kernels_named("baseline", residual_baseline);
#endif

}  // namespace svdkern
