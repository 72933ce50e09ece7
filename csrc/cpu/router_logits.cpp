#include "ops/router_logits.h"

#include <ATen/ops/mm.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

namespace moe_ext::cpu {
namespace {

// operators

at::Tensor router_logits(const at::Tensor& tokens, const at::Tensor& weight) {
  check_router_logits(tokens, weight);
  // The router's product stays in fp32 under autocast too.
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const at::ScalarType dtype = router_logits_dtype(tokens, weight);
  return at::mm(tokens.to(dtype), weight.to(dtype).t());
}

std::tuple<at::Tensor, at::Tensor> router_logits_backward(
    const at::Tensor& grad_logits_, const at::Tensor& tokens, const at::Tensor& weight,
    std::array<bool, 2> output_mask) {
  check_router_logits_backward(grad_logits_, tokens, weight);
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const at::ScalarType dtype = router_logits_dtype(tokens, weight);
  const at::Tensor grad_logits = grad_logits_.to(dtype);
  at::Tensor grad_tokens, grad_weight;
  if (output_mask[0]) grad_tokens = at::mm(grad_logits, weight.to(dtype)).to(tokens.scalar_type());
  if (output_mask[1]) {
    grad_weight = at::mm(grad_logits.t(), tokens.to(dtype)).to(weight.scalar_type());
  }
  return {grad_tokens, grad_weight};
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, CPU, m) {
  m.impl("_router_logits", router_logits);
  m.impl("_router_logits_backward", router_logits_backward);
}

}  // namespace moe_ext::cpu
