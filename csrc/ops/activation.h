// The activations' names.
#pragma once

#include <c10/util/Exception.h>
#include <c10/util/string_view.h>

#include "common/activation.h"

namespace moe_ext {

inline Activation parse_activation(const char* op, c10::string_view name, bool gated) {
  if (name == "silu") return Activation::kSilu;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "relu") return Activation::kRelu;
  if (name == "relu2") return Activation::kRelu2;
  if (name == "identity") return Activation::kIdentity;
  TORCH_CHECK_VALUE(
      name == "swiglu_clamped", op,
      ": activation must be silu, gelu, gelu_tanh, relu, relu2, identity or swiglu_clamped, got ",
      name);
  TORCH_CHECK_VALUE(gated, op, ": activation must be gated for swiglu_clamped, got gated=False");
  return Activation::kSwigluClamped;
}

}  // namespace moe_ext
