// Machines with AVX2, FMA and F16C.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define MOE_AVX2
#include "cpu/kernels/table.h"

namespace moe_ext::cpu::kernels {

const Kernels kAvx2Kernels = make_table("avx2");

}  // namespace moe_ext::cpu::kernels

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
