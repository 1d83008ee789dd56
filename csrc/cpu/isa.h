// The tables of kernels that are compiled in, one a translation unit; which of them exist is a matter of the target.
#pragma once

#include "../svdkern.h"

namespace svdkern {

extern const Kernels baseline_kernels;
void residual_baseline(const ResidualParams&);
#if defined(__x86_64__)
extern const Kernels avx2_kernels, avx512_kernels, avx512_bf16_kernels, amx_bf16_kernels;
void residual_avx2(const ResidualParams&), residual_avx512(const ResidualParams&);
#endif

}  // namespace svdkern
