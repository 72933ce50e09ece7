// In place of torch's: see tests/emulation/emulate.py.
#pragma once

#include <c10/util/Exception.h>

#define C10_CUDA_CHECK(call) TORCH_CHECK((call) == 0)
#define C10_CUDA_KERNEL_LAUNCH_CHECK()
