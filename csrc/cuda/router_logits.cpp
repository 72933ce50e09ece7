#include "ops/router_logits.h"

#include <ATen/ops/mm.h>
#include <torch/library.h>

#include "cuda/operands.h"

namespace moe_ext::cuda {
namespace {

// a b in dtype, summed in it. cuBLAS reads operands of one half type as they are.
at::Tensor product(const at::Tensor& a, const at::Tensor& b, at::ScalarType dtype) {
  const WithoutAutogradAndAutocast plain;
  const bool narrow = a.scalar_type() == at::kBFloat16 || a.scalar_type() == at::kHalf;
  if (narrow && a.scalar_type() == b.scalar_type() && a.numel() > 0) return at::mm(a, b, dtype);
  return at::mm(a.to(dtype), b.to(dtype));
}

at::Tensor router_logits(const at::Tensor& tokens, const at::Tensor& weight) {
  check_router_logits(tokens, weight);
  const c10::cuda::CUDAGuard device_guard(tokens.device());
  return product(tokens, weight.t(), router_logits_dtype(tokens, weight));
}

std::tuple<at::Tensor, at::Tensor> router_logits_backward(
    const at::Tensor& grad_logits, const at::Tensor& tokens, const at::Tensor& weight,
    std::array<bool, 2> output_mask) {
  check_router_logits_backward(grad_logits, tokens, weight);
  const c10::cuda::CUDAGuard device_guard(tokens.device());
  const at::ScalarType dtype = router_logits_dtype(tokens, weight);
  at::Tensor grad_tokens, grad_weight;
  if (output_mask[0]) grad_tokens = product(grad_logits, weight, dtype).to(tokens.scalar_type());
  if (output_mask[1]) {
    grad_weight = product(grad_logits.t(), tokens, dtype).to(weight.scalar_type());
  }
  return {grad_tokens, grad_weight};
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, CUDA, m) {
  m.impl("_router_logits", router_logits);
  m.impl("_router_logits_backward", router_logits_backward);
}

}  // namespace moe_ext::cuda
