// Machines with AVX-512 F, BW, VL, DQ and BF16.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(                                                               \
    __attribute__((target("avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif
#define MOE_AVX2
#define MOE_AVX512
#define MOE_AVX512_BF16
#include "cpu/kernels/table.h"

namespace moe_ext::cpu::kernels {

const Kernels kAvx512Bf16Kernels = make_table("avx512_bf16");

}  // namespace moe_ext::cpu::kernels

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
