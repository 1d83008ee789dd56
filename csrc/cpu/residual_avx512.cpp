// The exact residual on AVX-512, without its FMA.
#include "isa.h"
#include "residual.h"

namespace svdkern {

void residual_avx512(const ResidualParams& p) { residual_of(p); }

}  // namespace svdkern
