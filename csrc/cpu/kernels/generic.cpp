// Any machine: vectors of 16 bytes, which every compiler target has or emulates.
#include "cpu/kernels/table.h"

namespace moe_ext::cpu::kernels {

const Kernels kGenericKernels = make_table("generic");

}  // namespace moe_ext::cpu::kernels
