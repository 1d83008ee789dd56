// Which instruction set runs: asked of the CPU (and, for registers that the OS must save, of the OS) at run time.
#include <cstring>

#include "isa.h"

namespace svdkern {

int list_isas(Isa (&isas)[max_isas]) {
  int n = 0;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  isas[n++] = {&avx512_bf16_kernels, avx512 && __builtin_cpu_supports("avx512bf16")};
  isas[n++] = {&avx512_kernels, avx512};
  isas[n++] = {&avx2_kernels, avx2};
#endif
  isas[n++] = {&baseline_kernels, true};
  return n;
}

const Kernels* select_kernels(const char* forced) {
  Isa isas[max_isas];
  const int n = list_isas(isas);
  const bool any = forced == nullptr || *forced == '\0';
  for (int i = 0; i < n; ++i)
    if (isas[i].available && (any || std::strcmp(forced, isas[i].kernels->name) == 0)) return isas[i].kernels;
  return nullptr;
}

}  // namespace svdkern
