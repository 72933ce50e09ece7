// Tensors as the kernels see them. A descriptor points into its tensor, which must outlive it.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "cpu/kernels/kernels.h"
#include "ops/dtypes.h"
#include "ops/operands.h"

namespace moe_ext::cpu {

inline Type type_of(at::ScalarType dtype) {
  return dtype == at::kDouble     ? Type::kF64
         : dtype == at::kFloat    ? Type::kF32
         : dtype == at::kBFloat16 ? Type::kBf16
                                  : Type::kF16;
}

inline const kernels::TypeKernels& kernels_for(at::ScalarType dtype) {
  return kernels::current().type[static_cast<int>(type_of(dtype))];
}

inline const kernels::TypeKernels& packed_kernels_for(at::ScalarType dtype) {
  return kernels::current().packed[static_cast<int>(type_of(dtype))];
}

// dtype: a compute dtype.
inline const kernels::RouterKernels& router_kernels_for(at::ScalarType dtype) {
  return kernels::current().router[dtype == at::kDouble ? 0 : 1];
}

// The tensor itself if a row's elements are neighbours, else a copy.
inline at::Tensor with_dense_rows(const at::Tensor& matrix) {
  return matrix.stride(1) == 1 || matrix.size(1) == 1 ? matrix : matrix.contiguous();
}

// matrix: with_dense_rows.
inline kernels::Rows rows_of(const at::Tensor& matrix, const int32_t* index = nullptr) {
  return {matrix.const_data_ptr(), matrix.stride(0), index};
}

// weight [E, N, K] itself if its rows or its columns are dense, else a copy.
inline at::Tensor with_dense_weights(const at::Tensor& weight) {
  const bool dense =
      weight.stride(1) == 1 || weight.stride(2) == 1 || weight.size(1) == 1 || weight.size(2) == 1;
  return dense ? weight : weight.contiguous();
}

// weight: with_dense_weights. The stride of a dimension of one element says nothing.
inline kernels::Weights weights_of(const at::Tensor& weight) {
  const int64_t n_stride = weight.size(1) == 1 ? 1 : weight.stride(1);
  const int64_t k_stride = weight.size(2) == 1 ? 1 : weight.stride(2);
  return {weight.const_data_ptr(), weight.stride(0), n_stride, k_stride};
}

// packed [E, blocks, steps, 64, P], contiguous.
inline kernels::Weights packed_weights_of(const at::Tensor& packed) {
  return {packed.const_data_ptr(), packed.stride(0), packed.stride(1), 0};
}

// Arguments of the product left^T right into the weights' gradient grad [E, M, N], contiguous or
// transposed: then its transpose is right^T left.
inline kernels::GradWeightsArgs grad_weights_args(
    const kernels::Rows& left, const kernels::Rows& right, const at::Tensor& grad, bool stream) {
  const int64_t M = grad.size(1), N = grad.size(2);
  void* data = grad.mutable_data_ptr();
  if (is_transposed(grad)) return {N, M, right, left, data, M * N, M, stream};
  return {M, N, left, right, data, M * N, N, stream};
}

inline kernels::Weights transposed(kernels::Weights weights) {
  std::swap(weights.n_stride, weights.k_stride);
  return weights;
}

// bias [E, N], contiguous, or undefined.
inline kernels::Bias bias_of(const at::Tensor& bias) {
  return bias.defined() ? kernels::Bias{bias.const_data_ptr(), bias.stride(0)}
                        : kernels::Bias{nullptr, 0};
}

}  // namespace moe_ext::cpu
