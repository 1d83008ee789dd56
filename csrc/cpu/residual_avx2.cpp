// The exact residual on AVX2, without its FMA.
#include "isa.h"
#include "residual.h"

namespace svdkern {

void residual_avx2(const ResidualParams& p) { residual_of(p); }

}  // namespace svdkern
