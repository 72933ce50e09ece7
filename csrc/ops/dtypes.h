// The one list of dtypes, and what each computes in.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/core/Tensor.h>

#include <optional>

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

// The values as a contiguous tensor of dtype; an absent tensor stays undefined.
inline at::Tensor contiguous_in(const at::Tensor& tensor, at::ScalarType dtype) {
  return tensor.to(dtype).contiguous();
}
inline at::Tensor contiguous_in(const std::optional<at::Tensor>& tensor, at::ScalarType dtype) {
  return tensor ? contiguous_in(*tensor, dtype) : at::Tensor();
}

template <class T>
const T* data_or_null(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr<T>() : nullptr;
}

inline const void* any_data_or_null(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr() : nullptr;
}

inline void* mutable_data_or_null(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.mutable_data_ptr() : nullptr;
}

}  // namespace moe_ext
