// Output shapes of the router's operators and the losses, for torch.compile and meta tensors.
#include <torch/library.h>

#include "ops/aux_loss.h"
#include "ops/pairs.h"
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
    const std::optional<at::Tensor>& token_mask, bool, c10::SymInt num_sequences,
    const std::optional<at::Tensor>& expert_share) {
  check_load_balancing_loss(router_probs, topk_ids, token_mask, num_sequences, expert_share);
  return empty_load_balancing_loss_outputs(router_probs, num_sequences);
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
  return empty_mean(router_logits);
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

at::Tensor router_entropy(
    const at::Tensor& router_probs, const std::optional<at::Tensor>& token_mask) {
  check_router_entropy(router_probs, token_mask);
  return empty_mean(router_probs);
}

at::Tensor apply_capacity(
    const at::Tensor& topk_weights, const at::Tensor& topk_ids, const at::Tensor& capacity_factor,
    c10::SymInt num_experts, c10::SymInt min_capacity, c10::string_view drop_policy) {
  check_apply_capacity(
      topk_weights, topk_ids, capacity_factor, num_experts, min_capacity, drop_policy);
  return empty_kept_ids(topk_ids);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> round_tokens(
    const at::Tensor& router_probs, const at::Tensor& topk_weights, const at::Tensor& topk_ids,
    c10::SymInt tile_size, c10::string_view rounding,
    const std::optional<at::Tensor>& capacity_factor, c10::SymInt min_capacity,
    const std::optional<at::Tensor>& noise) {
  const Rounding parsed = check_round_tokens(
      router_probs, topk_weights, topk_ids, tile_size, rounding, capacity_factor, min_capacity,
      noise);
  return empty_round_tokens_outputs(router_probs, topk_ids, tile_size, parsed);
}

std::tuple<at::Tensor, at::Tensor> expert_choice(
    const at::Tensor& router_probs, const std::optional<at::Tensor>& token_mask,
    c10::SymInt top_k) {
  check_expert_choice(router_probs, token_mask, top_k);
  return empty_expert_choice_outputs(router_probs, top_k);
}

at::Tensor pair_weights(
    const at::Tensor& topk_weights, const at::Tensor& router_probs, const at::Tensor& pair_tokens,
    const at::Tensor& pair_experts, const std::optional<at::Tensor>& pair_slots,
    c10::SymInt num_experts, double) {
  check_pair_weights(
      topk_weights, router_probs, pair_tokens, pair_experts, pair_slots, num_experts);
  return empty_pair_weights(router_probs, pair_tokens);
}

std::tuple<at::Tensor, at::Tensor> pair_weights_backward(
    const at::Tensor& grad, const at::Tensor& topk_weights, const at::Tensor& pair_tokens,
    const at::Tensor& pair_experts, const std::optional<at::Tensor>& pair_slots,
    c10::SymInt num_experts, double, std::array<bool, 2> output_mask) {
  check_pair_weights_backward(
      grad, topk_weights, pair_tokens, pair_experts, pair_slots, num_experts);
  return empty_pair_weights_grads(topk_weights, num_experts, output_mask);
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, Meta, m) {
  m.impl("_router_logits", router_logits);
  m.impl("_router_logits_backward", router_logits_backward);
  m.impl("topk_router", topk_router);
  m.impl("_router_weights", router_weights);
  m.impl("_router_weights_backward", router_weights_backward);
  m.impl("_load_balancing_loss_forward", load_balancing_loss_forward);
  m.impl("_load_balancing_loss_backward", load_balancing_loss_backward);
  m.impl("router_z_loss", router_z_loss);
  m.impl("_router_z_loss_backward", router_z_loss_backward);
  m.impl("_tokens_per_expert", tokens_per_expert);
  m.impl("_router_entropy", router_entropy);
  m.impl("_apply_capacity", apply_capacity);
  m.impl("_round_tokens", round_tokens);
  m.impl("_expert_choice", expert_choice);
  m.impl("_pair_weights", pair_weights);
  m.impl("_pair_weights_backward", pair_weights_backward);
}

}  // namespace moe_ext::meta
