// Which instruction set runs. __builtin_cpu_supports reads cpuid and whether the operating system
// saves the registers.
#include <atomic>
#include <cstring>
#include <initializer_list>

#include "cpu/kernels/kernels.h"

namespace moe_ext::cpu::kernels {
namespace {

const Kernels* find(const char* name) {
  if (!std::strcmp(name, "generic")) return &kGenericKernels;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  if (avx2 && !std::strcmp(name, "avx2")) return &kAvx2Kernels;
  if (avx512 && !std::strcmp(name, "avx512")) return &kAvx512Kernels;
  if (avx512 && __builtin_cpu_supports("avx512bf16") && !std::strcmp(name, "avx512_bf16")) {
    return &kAvx512Bf16Kernels;
  }
#endif
  return nullptr;
}

const Kernels* best() {
  for (const char* name : {"avx512_bf16", "avx512", "avx2"}) {
    if (const Kernels* found = find(name)) return found;
  }
  return &kGenericKernels;
}

std::atomic<const Kernels*>& table() {
  static std::atomic<const Kernels*> chosen{best()};
  return chosen;
}

}  // namespace

const Kernels& current() { return *table().load(std::memory_order_relaxed); }

bool set_isa(const char* name) {
  const Kernels* found = find(name);
  if (found) table().store(found);
  return found != nullptr;
}

}  // namespace moe_ext::cpu::kernels
