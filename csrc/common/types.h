// The stored types of rows and weights, and what both sides count with.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace moe_ext {

enum class Type { kF64, kF32, kBf16, kF16 };

// For a >= 0 and b > 0.
static MOE_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace moe_ext
