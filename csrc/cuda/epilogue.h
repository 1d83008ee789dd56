// What stands between the product h = a F and z (params.h), one element at a time.
#pragma once

#include "element.h"

namespace svdkern::cuda {

// z of one element from the sums h of its row; scale is load(by.scale), the same for all.
__device__ inline float modulated(const Epilogue& by, const float* sums, int64_t row, int rank, int r, float scale) {
  const float* gate = by.gate ? by.gate + row * r : nullptr;
  float value = sums[rank];
  if (by.core.data) {
    value = 0.0f;
    for (int i = 0; i < r; ++i) {
      const float h = gate && by.gate_first ? sums[i] * gate[i] : sums[i];
      value = fmaf(h, load(by.core.data, by.core.dtype, i * by.core.row_stride + rank * by.core.col_stride), value);
    }
    if (gate && by.gate_first) gate = nullptr;
  } else if (by.sigma.data) {
    value *= load(by.sigma.data, by.sigma.dtype, rank * by.sigma.stride);
  }
  return value * scale * (gate ? gate[rank] : 1.0f);
}

}  // namespace svdkern::cuda
