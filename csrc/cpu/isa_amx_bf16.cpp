// AVX-512 with bf16 and AMX tiles: Sapphire Rapids and later.
#include "isa.h"
#include "primitives.h"

namespace svdkern {

extern const Kernels amx_bf16_kernels = kernels_named("amx_bf16", residual_avx512);

}  // namespace svdkern
