// Tensors as the kernels see them.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda/kernels/kernels.h"
#include "ops/dtypes.h"

namespace moe_ext::cuda {

inline Type type_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble:
      return Type::kF64;
    case at::kFloat:
      return Type::kF32;
    case at::kBFloat16:
      return Type::kBf16;
    default:
      return Type::kF16;
  }
}

inline IdType id_type_of(const at::Tensor& ids) {
  return ids.scalar_type() == at::kLong ? IdType::kI64 : IdType::kI32;
}

inline const void* any_data_or_null(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr() : nullptr;
}

inline void* mutable_data_or_null(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.mutable_data_ptr() : nullptr;
}

// Scratch memory of a kernel, from torch's allocator.
inline at::Tensor empty_workspace(size_t bytes, const at::Tensor& like) {
  return at::empty({static_cast<int64_t>(bytes)}, like.options().dtype(at::kByte));
}

}  // namespace moe_ext::cuda
