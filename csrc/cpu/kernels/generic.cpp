// Any machine: vectors of 16 bytes, which every compiler target has or emulates.
#include "cpu/kernels/experts.h"

namespace moe_ext::kernels {

const Kernels kGenericKernels = {
    "generic",
    {Experts<double>::table(), Experts<float>::table(), Experts<bf16>::table(),
     Experts<f16>::table()}};

}  // namespace moe_ext::kernels
