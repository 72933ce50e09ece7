// The one list of dtypes, and what each computes in.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/core/Tensor.h>

// Runs the lambda with `scalar_t` for the dtypes that arithmetic runs in (see compute_dtype).
#define MOE_DISPATCH_COMPUTE(TYPE, NAME, ...) \
  AT_DISPATCH_SWITCH(                         \
      TYPE, NAME,                             \
      AT_DISPATCH_CASE(at::kDouble, __VA_ARGS__) AT_DISPATCH_CASE(at::kFloat, __VA_ARGS__))

namespace moe_ext {

inline bool is_supported_float(at::ScalarType dtype) {
  return dtype == at::kDouble || dtype == at::kFloat || dtype == at::kBFloat16 ||
         dtype == at::kHalf;
}

// fp32, or fp64 for fp64: what sums are kept in, and the whole of the router's mathematics.
inline at::ScalarType compute_dtype(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

}  // namespace moe_ext
