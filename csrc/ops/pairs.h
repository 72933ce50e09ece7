// The operators that make a list of (token, expert) pairs, for routings that give every token
// another number of experts. A list's length depends on shapes only; unused entries are -1; the
// pairs of an expert are neighbours, in the order of their tokens.
//
// _round_tokens: every expert's number of tokens becomes a multiple of the tile size (token
// rounding, arXiv 2512.14080; the rules: common/token_rounding.h). An expert with too many drops
// its lowest weights, one with too few takes the highest probabilities among the tokens that did
// not choose it; ties go to the earlier token.
//
//   router_probs     [T, E]  float, >= 0
//   topk_weights     [T, K]  float
//   topk_ids         [T, K]  int64 or int32, distinct in a row; a row without a valid id is masked
//   capacity_factor  []      float64 or none: the counts also stay within the capacity
//   noise            [E]     float64 in [0, 1): for "stochastic" only
//   pair_tokens, pair_experts, pair_slots  [P] int64; a slot is t K + k, or -1 for a padded pair
//   kept_ids         [T, K]  int64: -1 where a slot was dropped or skipped
//   P = T K + E M / 2 (nearest), T K (down), T K + E (M - 1) (others)
//
// _expert_choice: every expert takes its C' = min(T', ceil(T' K / E)) best of the T' unmasked
// tokens (arXiv 2202.09368); ties go to the earlier token.
//
//   router_probs               [T, E]  float, >= 0
//   token_mask                 [T]     bool or none
//   pair_tokens, pair_experts  [P]     int64; P = E min(T, ceil(T K / E))
//
// _pair_weights: the weight of every pair: that of its slot, or scaling_factor times the
// probability of (token, expert) for a padded pair (or where no pair has a slot); 0 if unused.
//
//   topk_weights  [T, K]  fp32 or fp64          router_probs  [T, E]  its dtype
//   pair_slots    [P] int64 or none             out           [P]     its dtype
#pragma once

#include <tuple>

#include "common/token_rounding.h"
#include "ops/capacity.h"

namespace moe_ext {

inline Rounding parse_rounding(const char* op, c10::string_view name) {
  if (name == "nearest") return Rounding::kNearest;
  if (name == "up") return Rounding::kUp;
  if (name == "down") return Rounding::kDown;
  if (name == "stochastic") return Rounding::kStochastic;
  TORCH_CHECK_VALUE(
      name == "balanced", op, ": rounding must be nearest, up, down, stochastic or balanced, got ",
      name);
  return Rounding::kBalanced;
}

inline void check_router_probs(const char* op, const at::Tensor& router_probs) {
  check_float(op, "router_probs", router_probs);
  check_shape(op, "router_probs", router_probs, {{"T"}, {"E"}});
  check_positive(op, "router_probs", "E", router_probs.sym_size(1));
  check_num_experts(op, "router_probs' E", router_probs.sym_size(1));
}

inline Rounding check_round_tokens(
    const at::Tensor& router_probs, const at::Tensor& topk_weights, const at::Tensor& topk_ids,
    const c10::SymInt& tile_size, c10::string_view rounding,
    const std::optional<at::Tensor>& capacity_factor, const c10::SymInt& min_capacity,
    const std::optional<at::Tensor>& noise) {
  constexpr const char* op = "_round_tokens";
  check_router_probs(op, router_probs);
  check_slots(op, topk_weights, topk_ids);
  check_shape(op, "topk_ids", topk_ids, {{"T", router_probs.sym_size(0)}, {"K"}});
  check_device(op, "topk_ids", topk_ids, router_probs.device());
  constexpr int64_t kMostTile = 1 << 20;  // the pairs grow with it
  TORCH_CHECK_VALUE(
      tile_size >= 1 && tile_size <= kMostTile, op, ": tile_size must be in [1, 2^20], got ",
      tile_size);
  if (capacity_factor) check_capacity_factor(op, *capacity_factor, min_capacity, topk_ids);
  const Rounding parsed = parse_rounding(op, rounding);
  TORCH_CHECK_VALUE(
      noise.has_value() == (parsed == Rounding::kStochastic), op,
      ": noise must be given for stochastic rounding and no other, got rounding ", rounding);
  if (noise) {
    check_dtype(op, "noise", *noise, at::kDouble);
    check_shape(op, "noise", *noise, {{"E", router_probs.sym_size(1)}});
    check_device(op, "noise", *noise, router_probs.device());
  }
  return parsed;
}

// pair_tokens, pair_experts, pair_slots, kept_ids.
inline std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> empty_round_tokens_outputs(
    const at::Tensor& router_probs, const at::Tensor& topk_ids, const c10::SymInt& tile_size,
    Rounding rounding) {
  const c10::SymInt E = router_probs.sym_size(1);
  c10::SymInt padding = E * (tile_size - 1);
  if (rounding == Rounding::kNearest) padding = E * tile_size / 2;
  if (rounding == Rounding::kDown) padding = 0;
  const c10::SymInt P = topk_ids.sym_numel() + padding;
  const auto options = topk_ids.options().dtype(at::kLong);
  return {
      empty_result({P}, options), empty_result({P}, options), empty_result({P}, options),
      empty_kept_ids(topk_ids)};
}

inline void check_expert_choice(
    const at::Tensor& router_probs, const std::optional<at::Tensor>& token_mask,
    const c10::SymInt& top_k) {
  constexpr const char* op = "_expert_choice";
  check_router_probs(op, router_probs);
  check_token_mask(op, token_mask, router_probs);
  const c10::SymInt E = router_probs.sym_size(1);
  TORCH_CHECK_VALUE(top_k >= 1 && top_k <= E, op, ": top_k must be in [1, E=", E, "], got ", top_k);
}

// How many of T tokens each of E experts takes.
inline c10::SymInt expert_choice_count(
    const c10::SymInt& T, const c10::SymInt& E, const c10::SymInt& K) {
  return ((T * K + E - 1) / E).min(T);
}

inline std::tuple<at::Tensor, at::Tensor> empty_expert_choice_outputs(
    const at::Tensor& router_probs, const c10::SymInt& top_k) {
  const c10::SymInt E = router_probs.sym_size(1);
  const c10::SymInt P = E * expert_choice_count(router_probs.sym_size(0), E, top_k);
  const auto options = router_probs.options().dtype(at::kLong);
  return {empty_result({P}, options), empty_result({P}, options)};
}

inline void check_pairs(
    const char* op, const at::Tensor& like, const at::Tensor& pair_tokens,
    const at::Tensor& pair_experts, const std::optional<at::Tensor>& pair_slots) {
  const auto check = [&](const char* argument, const at::Tensor& tensor) {
    check_dtype(op, argument, tensor, at::kLong);
    check_shape(op, argument, tensor, {{"P", pair_tokens.sym_size(0)}});
    check_device(op, argument, tensor, like.device());
  };
  check_shape(op, "pair_tokens", pair_tokens, {{"P"}});
  check("pair_tokens", pair_tokens);
  check("pair_experts", pair_experts);
  if (pair_slots) check("pair_slots", *pair_slots);
}

inline void check_pair_weights(
    const at::Tensor& topk_weights, const at::Tensor& router_probs, const at::Tensor& pair_tokens,
    const at::Tensor& pair_experts, const std::optional<at::Tensor>& pair_slots,
    const c10::SymInt& num_experts) {
  constexpr const char* op = "_pair_weights";
  check_shape(op, "router_probs", router_probs, {{"T"}, {"E", num_experts}});
  check_num_experts(op, "num_experts", num_experts);
  check_compute_float(op, "router_probs", router_probs);
  check_operand(
      op, "topk_weights", topk_weights, "router_probs", router_probs,
      {{"T", router_probs.sym_size(0)}, {"K"}});
  check_pairs(op, router_probs, pair_tokens, pair_experts, pair_slots);
}

inline at::Tensor empty_pair_weights(
    const at::Tensor& router_probs, const at::Tensor& pair_tokens) {
  return empty_result({pair_tokens.sym_size(0)}, router_probs.options());
}

inline void check_pair_weights_backward(
    const at::Tensor& grad, const at::Tensor& topk_weights, const at::Tensor& pair_tokens,
    const at::Tensor& pair_experts, const std::optional<at::Tensor>& pair_slots,
    const c10::SymInt& num_experts) {
  constexpr const char* op = "_pair_weights_backward";
  check_compute_float(op, "topk_weights", topk_weights);
  check_shape(op, "topk_weights", topk_weights, {{"T"}, {"K"}});
  check_shape(op, "pair_tokens", pair_tokens, {{"P"}});
  check_operand(op, "grad", grad, "topk_weights", topk_weights, {{"P", pair_tokens.sym_size(0)}});
  check_num_experts(op, "num_experts", num_experts);
  check_pairs(op, topk_weights, pair_tokens, pair_experts, pair_slots);
}

// Gradients of (topk_weights, router_probs) that `mask` asks for.
inline std::tuple<at::Tensor, at::Tensor> empty_pair_weights_grads(
    const at::Tensor& topk_weights, const c10::SymInt& num_experts,
    const std::array<bool, 2>& mask) {
  const auto options = topk_weights.options();
  return {
      mask[0] ? empty_result(topk_weights.sym_sizes(), options) : at::Tensor(),
      mask[1] ? empty_result({topk_weights.sym_size(0), num_experts}, options) : at::Tensor()};
}

}  // namespace moe_ext
