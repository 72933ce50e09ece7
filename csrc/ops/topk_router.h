// topk_router: logits -> the K experts of each token, their weights, and the probabilities that
// the balance losses see. All of it in fp32 (fp64 for fp64 logits). Definitions of the score
// functions: common/score_function.h.
//
//   router_logits  [T, E]  float
//   expert_bias    [E]     float or none; added to the scores for the choice only
//   topk_weights   [T, K]  fp32 or fp64
//   topk_ids       [T, K]  int64, by descending key; ties go to the lower id, NaN sorts last
//   router_probs   [T, E]  fp32 or fp64
//
// With num_groups > 1 only the experts of a token's best topk_groups groups are candidates.
//
// _router_weights: the same weights and probabilities for choices that are given; an id that is
// -1 or >= E is skipped (weight 0).
#pragma once

#include <tuple>

#include "ops/checks.h"
#include "ops/score_function.h"

namespace moe_ext {

struct TopkRouterOptions {
  ScoreFunction score_function;
  bool renormalize;
  double scaling_factor;
  int64_t num_groups;
  int64_t topk_groups;
};

inline void check_logits(const char* op, const at::Tensor& router_logits) {
  check_float(op, "router_logits", router_logits);
  check_shape(op, "router_logits", router_logits, {{"T"}, {"E"}});
  check_positive(op, "router_logits", "E", router_logits.sym_size(1));
  check_num_experts(op, "router_logits' E", router_logits.sym_size(1));
}

inline TopkRouterOptions check_topk_router(
    const at::Tensor& router_logits, const c10::SymInt& top_k, c10::string_view score_function,
    bool renormalize, double scaling_factor, const std::optional<at::Tensor>& expert_bias,
    int64_t num_groups, int64_t topk_groups) {
  constexpr const char* op = "topk_router";
  check_logits(op, router_logits);
  const c10::SymInt E = router_logits.sym_size(1);
  TORCH_CHECK_VALUE(top_k >= 1 && top_k <= E, op, ": top_k must be in [1, E=", E, "], got ", top_k);
  const ScoreFunction parsed = parse_score_function(op, score_function);
  if (expert_bias) {
    check_float(op, "expert_bias", *expert_bias);
    check_shape(op, "expert_bias", *expert_bias, {{"E", E}});
    check_device(op, "expert_bias", *expert_bias, router_logits.device());
  }
  TORCH_CHECK_VALUE(
      num_groups >= 1 && E % num_groups == 0, op, ": num_groups must divide E=", E, ", got ",
      num_groups);
  TORCH_CHECK_VALUE(
      topk_groups >= 1 && topk_groups <= num_groups, op,
      ": topk_groups must be in [1, num_groups=", num_groups, "], got ", topk_groups);
  const c10::SymInt group_size = E / num_groups;
  TORCH_CHECK_VALUE(
      top_k <= group_size * topk_groups, op,
      ": top_k must be at most topk_groups * E / num_groups = ", group_size * topk_groups, ", got ",
      top_k);
  TORCH_CHECK_VALUE(
      num_groups == 1 || parsed != ScoreFunction::kSigmoid || group_size >= 2, op,
      ": num_groups must leave groups of at least 2 experts for sigmoid, got groups of ",
      group_size);
  return {parsed, renormalize, scaling_factor, num_groups, topk_groups};
}

inline std::tuple<at::Tensor, at::Tensor, at::Tensor> empty_topk_router_outputs(
    const at::Tensor& router_logits, const c10::SymInt& top_k) {
  const auto options = router_logits.options().dtype(compute_dtype(router_logits.scalar_type()));
  const c10::SymInt T = router_logits.sym_size(0);
  return {
      empty_result({T, top_k}, options), empty_result({T, top_k}, options.dtype(at::kLong)),
      empty_result({T, router_logits.sym_size(1)}, options)};
}

inline ScoreFunction check_router_weights(
    const at::Tensor& router_logits, const at::Tensor& topk_ids, c10::string_view score_function) {
  constexpr const char* op = "_router_weights";
  check_logits(op, router_logits);
  check_ids_dtype(op, "topk_ids", topk_ids);
  check_shape(op, "topk_ids", topk_ids, {{"T", router_logits.sym_size(0)}, {"K"}});
  check_device(op, "topk_ids", topk_ids, router_logits.device());
  return parse_score_function(op, score_function);
}

inline std::tuple<at::Tensor, at::Tensor> empty_router_weights_outputs(
    const at::Tensor& router_logits, const at::Tensor& topk_ids) {
  const auto options = router_logits.options().dtype(compute_dtype(router_logits.scalar_type()));
  return {
      empty_result(topk_ids.sym_sizes(), options),
      empty_result(router_logits.sym_sizes(), options)};
}

inline ScoreFunction check_router_weights_backward(
    const std::optional<at::Tensor>& grad_weights, const std::optional<at::Tensor>& grad_probs,
    const at::Tensor& router_logits, const at::Tensor& topk_ids, c10::string_view score_function) {
  constexpr const char* op = "_router_weights_backward";
  const ScoreFunction parsed = check_router_weights(router_logits, topk_ids, score_function);
  const c10::SymInt T = router_logits.sym_size(0);
  if (grad_weights) {
    check_float(op, "grad_weights", *grad_weights);
    check_shape(op, "grad_weights", *grad_weights, {{"T", T}, {"K", topk_ids.sym_size(1)}});
    check_device(op, "grad_weights", *grad_weights, router_logits.device());
  }
  if (grad_probs) {
    check_float(op, "grad_probs", *grad_probs);
    check_shape(op, "grad_probs", *grad_probs, {{"T", T}, {"E", router_logits.sym_size(1)}});
    check_device(op, "grad_probs", *grad_probs, router_logits.device());
  }
  return parsed;
}

}  // namespace moe_ext
