// Which instruction set runs: asked of the CPU (and, for registers that the OS must save, of the OS) at run time.
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "isa.h"

namespace svdkern {

#if defined(__x86_64__)
namespace {

// The tile registers are 8 KB of thread state that Linux grants a process on request (5.16 and later).
bool request_tiles() {
  unsigned eax, ebx, ecx, edx;
  constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & amx_bf16) == 0 || (edx & amx_tile) == 0) return false;
  constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

}  // namespace
#endif

int list_isas(Isa (&isas)[max_isas]) {
  int n = 0;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  static const bool tiles = avx512_bf16 && request_tiles();
  isas[n++] = {&amx_bf16_kernels, tiles};
  isas[n++] = {&avx512_bf16_kernels, avx512_bf16};
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
