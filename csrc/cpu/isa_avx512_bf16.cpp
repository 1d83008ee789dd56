// AVX-512 with bf16 dot products (vdpbf16ps): Cooper Lake, Sapphire Rapids, Zen 4 and later.
#include "isa.h"
#include "primitives.h"

namespace svdkern {

extern const Kernels avx512_bf16_kernels = kernels_named("avx512_bf16", residual_avx512);

}  // namespace svdkern
