// In place of torch's: see tests/emulate_cuda.py.
#pragma once

#include <c10/util/Exception.h>

#include <cstdlib>

#define C10_CUDA_CHECK(call) TORCH_CHECK((call) == 0)
#define C10_CUDA_KERNEL_LAUNCH_CHECK()

// As which GPU the emulation goes: its compute capability's major number.
enum { cudaDevAttrComputeCapabilityMajor };
inline int cudaDeviceGetAttribute(int* value, int, int) {
  const char* major = std::getenv("MOE_EXT_EMULATED_MAJOR");
  *value = major ? std::atoi(major) : 8;
  return 0;
}
