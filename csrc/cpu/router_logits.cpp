#include "ops/router_logits.h"

#include "cpu/grouped_gemm.h"
#include "cpu/operands.h"
#include "cpu/register.h"

namespace moe_ext::cpu {
namespace {

// The router is a linear layer: one expert, to whom all rows belong.

// rows [M, K] weights^T, all in the compute dtype.
at::Tensor product(const at::Tensor& rows, const kernels::Weights& weights, int64_t N) {
  const at::Tensor out = empty_result({rows.size(0), N}, rows.options());
  grouped_product(rows, {0, rows.size(0)}, weights, {}, out);
  return out;
}

// A batch of one.
at::Tensor as_weights(const at::Tensor& weight, at::ScalarType dtype) {
  return with_dense_weights(weight.to(dtype).unsqueeze(0));
}

// operators

at::Tensor router_logits(const at::Tensor& tokens, const at::Tensor& weight_) {
  check_router_logits(tokens, weight_);
  check_count("_router_logits", "tokens", "rows", tokens.size(0));
  const at::ScalarType dtype = router_logits_dtype(tokens, weight_);
  const at::Tensor weight = as_weights(weight_, dtype);
  return product(with_dense_rows(tokens.to(dtype)), weights_of(weight), weight_.size(0));
}

std::tuple<at::Tensor, at::Tensor> router_logits_backward(
    const at::Tensor& grad_logits_, const at::Tensor& tokens_, const at::Tensor& weight_,
    std::array<bool, 2> output_mask) {
  check_router_logits_backward(grad_logits_, tokens_, weight_);
  check_count("_router_logits_backward", "tokens", "rows", tokens_.size(0));
  const at::ScalarType dtype = router_logits_dtype(tokens_, weight_);
  const at::Tensor grad_logits = with_dense_rows(grad_logits_.to(dtype));
  at::Tensor grad_tokens, grad_weight;
  if (output_mask[0]) {
    const at::Tensor weight = as_weights(weight_, dtype);
    grad_tokens = product(grad_logits, transposed(weights_of(weight)), weight_.size(1))
                      .to(tokens_.scalar_type());
  }
  if (output_mask[1]) {
    const at::Tensor tokens = with_dense_rows(tokens_.to(dtype));
    grad_weight = empty_result(weight_.sym_sizes(), tokens.options());
    const auto& kernels = kernels_for(dtype);
    const kernels::GradWeightsArgs args =
        grad_weights_args(rows_of(grad_logits), rows_of(tokens), grad_weight.unsqueeze(0), false);
    const auto all_rows = whole_experts({0, tokens.size(0)});
    run_phases(
        {{grad_weights_job(kernels, args, all_rows)}}, kernels.grad_scratch_bytes(tokens.size(0)),
        estimate_nanoseconds(tokens.numel() * weight_.size(0), 0));
    grad_weight = grad_weight.to(weight_.scalar_type());
  }
  return {grad_tokens, grad_weight};
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, CPU, m) {
  impl<router_logits>(m, "_router_logits");
  impl<router_logits_backward>(m, "_router_logits_backward");
}

}  // namespace moe_ext::cpu
