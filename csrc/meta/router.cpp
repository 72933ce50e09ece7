// Output shapes of the router's operators and the losses, for torch.compile and meta tensors.
#include <torch/library.h>

#include "ops/aux_loss.h"
#include "ops/router_logits.h"
#include "ops/topk_router.h"

namespace moe_ext::meta {
namespace {

at::Tensor router_logits(const at::Tensor& tokens, const at::Tensor& weight) {
  check_router_logits(tokens, weight);
  return empty_router_logits(tokens, weight);
}

std::tuple<at::Tensor, at::Tensor> router_logits_backward(
    const at::Tensor& grad_logits, const at::Tensor& tokens, const at::Tensor& weight,
    std::array<bool, 2> output_mask) {
  check_router_logits_backward(grad_logits, tokens, weight);
  return {
      output_mask[0] ? empty_like_contiguous(tokens) : at::Tensor(),
      output_mask[1] ? empty_like_contiguous(weight) : at::Tensor()};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> topk_router(
    const at::Tensor& router_logits, c10::SymInt top_k, c10::string_view score_function,
    bool renormalize, double scaling_factor, const std::optional<at::Tensor>& expert_bias,
    int64_t num_groups, int64_t topk_groups) {
  check_topk_router(
      router_logits, top_k, score_function, renormalize, scaling_factor, expert_bias, num_groups,
      topk_groups);
  return empty_topk_router_outputs(router_logits, top_k);
}

std::tuple<at::Tensor, at::Tensor> router_weights(
    const at::Tensor& router_logits, const at::Tensor& topk_ids, c10::string_view score_function,
    bool, double) {
  check_router_weights(router_logits, topk_ids, score_function);
  return empty_router_weights_outputs(router_logits, topk_ids);
}

at::Tensor router_weights_backward(
    const std::optional<at::Tensor>& grad_weights, const std::optional<at::Tensor>& grad_probs,
    const at::Tensor& router_logits, const at::Tensor& topk_ids, c10::string_view score_function,
    bool, double) {
  check_router_weights_backward(grad_weights, grad_probs, router_logits, topk_ids, score_function);
  return empty_like_contiguous(router_logits);
}

std::tuple<at::Tensor, at::Tensor> load_balancing_loss_forward(
    const at::Tensor& router_probs, const at::Tensor& topk_ids,
    const std::optional<at::Tensor>& token_mask, bool) {
  check_load_balancing_loss(router_probs, topk_ids, token_mask);
  return empty_load_balancing_loss_outputs(router_probs);
}

at::Tensor load_balancing_loss(
    const at::Tensor& router_probs, const at::Tensor& topk_ids,
    const std::optional<at::Tensor>& token_mask, bool normalize_by_topk) {
  return std::get<0>(
      load_balancing_loss_forward(router_probs, topk_ids, token_mask, normalize_by_topk));
}

at::Tensor load_balancing_loss_backward(
    const at::Tensor& grad_loss, const at::Tensor& grad_row, const at::Tensor& topk_ids,
    const std::optional<at::Tensor>& token_mask) {
  check_load_balancing_loss_backward(grad_loss, grad_row, topk_ids, token_mask);
  return empty_grad_router_probs(grad_row, topk_ids);
}

at::Tensor router_z_loss(
    const at::Tensor& router_logits, const std::optional<at::Tensor>& token_mask) {
  check_router_z_loss(router_logits, token_mask);
  return empty_router_z_loss(router_logits);
}

at::Tensor router_z_loss_backward(
    const at::Tensor& grad_loss, const at::Tensor& router_logits,
    const std::optional<at::Tensor>& token_mask) {
  check_router_z_loss_backward(grad_loss, router_logits, token_mask);
  return empty_like_contiguous(router_logits);
}

at::Tensor tokens_per_expert(const at::Tensor& topk_ids, c10::SymInt num_experts) {
  check_tokens_per_expert(topk_ids, num_experts);
  return empty_tokens_per_expert(topk_ids, num_experts);
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, Meta, m) {
  m.impl("_router_logits", router_logits);
  m.impl("_router_logits_backward", router_logits_backward);
  m.impl("topk_router", topk_router);
  m.impl("_router_weights", router_weights);
  m.impl("_router_weights_backward", router_weights_backward);
  m.impl("load_balancing_loss", load_balancing_loss);
  m.impl("_load_balancing_loss_forward", load_balancing_loss_forward);
  m.impl("_load_balancing_loss_backward", load_balancing_loss_backward);
  m.impl("router_z_loss", router_z_loss);
  m.impl("_router_z_loss_backward", router_z_loss_backward);
  m.impl("_tokens_per_expert", tokens_per_expert);
}

}  // namespace moe_ext::meta
