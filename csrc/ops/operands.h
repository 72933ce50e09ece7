// Operands and results of the operators, on every device.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace moe_ext {

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

// A new contiguous tensor. On the CPU cpu/empty_result.cpp allocates it: large ones come from a
// cache.
at::Tensor empty_result(c10::SymIntArrayRef sizes, const at::TensorOptions& options);

inline at::Tensor empty_like_contiguous(const at::Tensor& tensor) {
  return empty_result(tensor.sym_sizes(), tensor.options());
}

// Whether weight [E, N, K] is the transpose of a contiguous [E, K, N].
inline bool is_transposed(const at::Tensor& weight) {
  return !weight.is_contiguous() && weight.transpose(1, 2).is_contiguous();
}

// The gradient of weight [E, N, K], uninitialised: transposed if the weight is, so that autograd
// takes it as it is; else contiguous.
inline at::Tensor empty_grad_of_weight(const at::Tensor& weight) {
  if (!is_transposed(weight)) return empty_like_contiguous(weight);
  return empty_like_contiguous(weight.transpose(1, 2)).transpose(1, 2);
}

}  // namespace moe_ext
