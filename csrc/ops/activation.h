// The activations' names.
#pragma once

#include <c10/util/Exception.h>
#include <c10/util/string_view.h>

#include "common/activation.h"

namespace moe_ext {

enum class Activation { kSilu, kGelu, kGeluTanh, kRelu, kRelu2, kIdentity, kSwigluClamped };

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

// Calls fn with a value of the activation's type: Gated<F>, Ungated<F> or SwigluClamped.
template <class Fn>
void dispatch_activation(Activation activation, bool gated, const Fn& fn) {
  const auto with = [&](auto f) {
    using F = decltype(f);
    gated ? fn(Gated<F>{}) : fn(Ungated<F>{});
  };
  switch (activation) {
    case Activation::kSilu:
      return with(Silu{});
    case Activation::kGelu:
      return with(Gelu{});
    case Activation::kGeluTanh:
      return with(GeluTanh{});
    case Activation::kRelu:
      return with(Relu{});
    case Activation::kRelu2:
      return with(Relu2{});
    case Activation::kIdentity:
      return with(Identity{});
    case Activation::kSwigluClamped:
      return fn(SwigluClamped{});
  }
}

}  // namespace moe_ext
