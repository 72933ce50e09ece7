// Tensors as the kernels see them.
#pragma once

#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda/kernels/kernels.h"
#include "ops/dtypes.h"
#include "ops/operands.h"

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

inline kernels::IdType id_type_of(const at::Tensor& ids) {
  return ids.scalar_type() == at::kLong ? kernels::IdType::kI64 : kernels::IdType::kI32;
}

// For calls of torch's own products: what is computed here has its dtypes and its gradient already.
struct WithoutAutogradAndAutocast {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

// Scratch memory of a kernel, from torch's allocator.
inline at::Tensor empty_workspace(size_t bytes, const at::Tensor& like) {
  return at::empty({static_cast<int64_t>(bytes)}, like.options().dtype(at::kByte));
}

}  // namespace moe_ext::cuda
