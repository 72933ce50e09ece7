// Machines with AVX2, FMA and F16C.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define MOE_AVX2
#include "cpu/kernels/experts.h"

namespace moe_ext::kernels {

const Kernels kAvx2Kernels = {
    "avx2",
    {Experts<double>::table(), Experts<float>::table(), Experts<bf16>::table(),
     Experts<f16>::table()}};

}  // namespace moe_ext::kernels

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
