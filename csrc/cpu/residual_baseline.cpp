// The exact residual on SSE4.2 or Advanced SIMD; of its own file for -ffp-contract=off.
#include "isa.h"
#include "residual.h"

namespace svdkern {

void residual_baseline(const ResidualParams& p) { residual_of(p); }

}  // namespace svdkern
