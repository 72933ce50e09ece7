// The balance losses, in fp32 (fp64 for fp64 input), and the counts they rest on.
//
// load_balancing_loss: E sum_e f_e P_e, with f_e the share of the T' K choices that went to e (no
// gradient), P_e the mean over T' tokens of router_probs[:, e], T' the number of unmasked tokens;
// K times that with normalize_by_topk=False. 1 at balance; 0 if T' = 0. Skipped ids (-1 or >= E)
// are left out of f's numerator only.
//
//   router_probs  [T, E]  float
//   topk_ids      [T, K]  int64 or int32
//   token_mask    [T]     bool or none: False tokens count nowhere
//   expert_share  [E]     float or none: f, where it is counted elsewhere (over all ranks, say)
//   grad_row      [S, E]  the loss's gradient by router_probs, a row for every token of a sequence
//
// With num_sequences = S the tokens are S sequences of equal length, one after the other, and the
// loss is the mean of the sequences' own losses, over those that have an unmasked token.
//
// router_z_loss: mean over T' tokens of logsumexp(logits_t)^2.
//
// _tokens_per_expert: how many of topk_ids [T, K] name each expert, [E] int64.
//
// _router_entropy: the mean over T' tokens of -sum_e p_e log p_e of router_probs, in nats; no
// gradient.
#pragma once

#include <tuple>

#include "ops/checks.h"

namespace moe_ext {

// T tokens are num_sequences >= 1 sequences of equal length.
inline void check_sequences(
    const char* op, const char* argument, const c10::SymInt& num_sequences, const c10::SymInt& T) {
  TORCH_SYM_CHECK(
      (T % num_sequences).sym_eq(0), op, ": ", argument, " must divide T=", T, ", got ",
      num_sequences);
  // Any number divides no tokens, but a loss keeps a row for each.
  constexpr int64_t kMostEmpty = 1 << 20;
  TORCH_SYM_CHECK(
      num_sequences.sym_le(T.max(kMostEmpty)), op, ": ", argument,
      " must be <= 2^20 where there are no tokens, got ", num_sequences);
}

inline void check_load_balancing_loss(
    const at::Tensor& router_probs, const at::Tensor& topk_ids,
    const std::optional<at::Tensor>& token_mask, const c10::SymInt& num_sequences,
    const std::optional<at::Tensor>& expert_share) {
  constexpr const char* op = "load_balancing_loss";
  check_float(op, "router_probs", router_probs);
  check_shape(op, "router_probs", router_probs, {{"T"}, {"E"}});
  check_positive(op, "router_probs", "E", router_probs.sym_size(1));
  check_ids_dtype(op, "topk_ids", topk_ids);
  check_shape(op, "topk_ids", topk_ids, {{"T", router_probs.sym_size(0)}, {"K"}});
  check_positive(op, "topk_ids", "K", topk_ids.sym_size(1));
  check_device(op, "topk_ids", topk_ids, router_probs.device());
  check_token_mask(op, token_mask, router_probs);
  TORCH_CHECK_VALUE(num_sequences >= 1, op, ": num_sequences must be >= 1, got ", num_sequences);
  check_sequences(op, "num_sequences", num_sequences, router_probs.sym_size(0));
  if (expert_share) {
    check_float(op, "expert_share", *expert_share);
    check_shape(op, "expert_share", *expert_share, {{"E", router_probs.sym_size(1)}});
    check_device(op, "expert_share", *expert_share, router_probs.device());
    TORCH_CHECK_VALUE(
        num_sequences == 1, op, ": expert_share must go with num_sequences=1, got ", num_sequences);
  }
}

inline std::tuple<at::Tensor, at::Tensor> empty_load_balancing_loss_outputs(
    const at::Tensor& router_probs, const c10::SymInt& num_sequences) {
  const auto options = router_probs.options().dtype(compute_dtype(router_probs.scalar_type()));
  return {
      empty_result({}, options), empty_result({num_sequences, router_probs.sym_size(1)}, options)};
}

inline void check_load_balancing_loss_backward(
    const at::Tensor& grad_loss, const at::Tensor& grad_row, const at::Tensor& topk_ids,
    const std::optional<at::Tensor>& token_mask) {
  constexpr const char* op = "_load_balancing_loss_backward";
  check_compute_float(op, "grad_row", grad_row);
  check_shape(op, "grad_row", grad_row, {{"S"}, {"E"}});
  check_positive(op, "grad_row", "S", grad_row.sym_size(0));
  check_operand(op, "grad_loss", grad_loss, "grad_row", grad_row, {});
  check_ids_dtype(op, "topk_ids", topk_ids);
  check_shape(op, "topk_ids", topk_ids, {{"T"}, {"K"}});
  check_sequences(op, "grad_row's S", grad_row.sym_size(0), topk_ids.sym_size(0));
  check_device(op, "topk_ids", topk_ids, grad_row.device());
  check_token_mask(op, token_mask, topk_ids);
}

inline at::Tensor empty_grad_router_probs(const at::Tensor& grad_row, const at::Tensor& topk_ids) {
  return empty_result({topk_ids.sym_size(0), grad_row.sym_size(1)}, grad_row.options());
}

inline void check_router_entropy(
    const at::Tensor& router_probs, const std::optional<at::Tensor>& token_mask) {
  constexpr const char* op = "_router_entropy";
  check_float(op, "router_probs", router_probs);
  check_shape(op, "router_probs", router_probs, {{"T"}, {"E"}});
  check_positive(op, "router_probs", "E", router_probs.sym_size(1));
  check_token_mask(op, token_mask, router_probs);
}

inline void check_router_z_loss(
    const at::Tensor& router_logits, const std::optional<at::Tensor>& token_mask) {
  constexpr const char* op = "router_z_loss";
  check_float(op, "router_logits", router_logits);
  check_shape(op, "router_logits", router_logits, {{"T"}, {"E"}});
  check_positive(op, "router_logits", "E", router_logits.sym_size(1));
  check_token_mask(op, token_mask, router_logits);
}

// Of a mean over the tokens of `rows` [T, E].
inline at::Tensor empty_mean(const at::Tensor& rows) {
  return empty_result({}, rows.options().dtype(compute_dtype(rows.scalar_type())));
}

inline void check_router_z_loss_backward(
    const at::Tensor& grad_loss, const at::Tensor& router_logits,
    const std::optional<at::Tensor>& token_mask) {
  check_router_z_loss(router_logits, token_mask);
  constexpr const char* op = "_router_z_loss_backward";
  check_float(op, "grad_loss", grad_loss);
  check_shape(op, "grad_loss", grad_loss, {});
  check_device(op, "grad_loss", grad_loss, router_logits.device());
}

inline void check_tokens_per_expert(const at::Tensor& topk_ids, const c10::SymInt& num_experts) {
  constexpr const char* op = "_tokens_per_expert";
  check_ids_dtype(op, "topk_ids", topk_ids);
  check_shape(op, "topk_ids", topk_ids, {{"T"}, {"K"}});
  check_num_experts(op, "num_experts", num_experts);
}

inline at::Tensor empty_tokens_per_expert(
    const at::Tensor& topk_ids, const c10::SymInt& num_experts) {
  return empty_result({num_experts}, topk_ids.options().dtype(at::kLong));
}

}  // namespace moe_ext
