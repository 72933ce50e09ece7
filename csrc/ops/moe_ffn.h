// moe_ffn: permute, expert_ffn and unpermute in one; out[t] = sum_k w[t, k] ffn_{ids[t, k]}(x[t]).
//
//   tokens        [T, H]  float
//   topk_weights  [T, K]  float, any of the supported dtypes
//   topk_ids      [T, K]  int64 or int32; -1 or >= E marks a skipped slot
//   weights               as for expert_ffn
//   out           [T, H]  tokens' dtype; summed in fp32 (fp64) in an order that shapes and routing
//                         fix (on the CPU and for pairs by expert, else k ascending)
//   hidden, row_map, expert_offsets  what backward needs: expert_ffn.h, permute.h
//
// _moe_ffn_pairs: the same for a list of (token, expert, weight) of static length, for routings
// that give every token another number of experts.
//
//   pair_weights  [P]  float
//   pair_experts  [P]  int64 or int32; -1 or >= E marks an unused pair
//   pair_tokens   [P]  int64 or int32, in [0, T); -1 marks an unused pair
//   row_map       [P]  int32; the rows of an expert are in the order of their tokens
#pragma once

#include "ops/expert_ffn.h"
#include "ops/permute.h"

namespace moe_ext {

// The tokens, and which experts they have.
inline void check_assignment(
    const char* op, const at::Tensor& tokens, const at::Tensor& weights, const at::Tensor& ids,
    const std::optional<at::Tensor>& pair_tokens) {
  const bool pairs = pair_tokens.has_value();
  const char* ids_name = pairs ? "pair_experts" : "topk_ids";
  const char* weights_name = pairs ? "pair_weights" : "topk_weights";
  check_float(op, "tokens", tokens);
  check_shape(op, "tokens", tokens, {{"T"}, {"H"}});
  check_ids_dtype(op, ids_name, ids);
  check_device(op, ids_name, ids, tokens.device());
  check_float(op, weights_name, weights);
  check_device(op, weights_name, weights, tokens.device());
  if (pairs) {
    check_shape(op, ids_name, ids, {{"P"}});
    check_shape(op, weights_name, weights, {{"P", ids.sym_size(0)}});
    check_pair_tokens(op, *pair_tokens, ids);
  } else {
    check_shape(op, ids_name, ids, {{"T", tokens.sym_size(0)}, {"K"}});
    check_shape(op, weights_name, weights, {{"T", tokens.sym_size(0)}, {"K", ids.sym_size(1)}});
  }
}

inline Activation check_moe_ffn(
    const at::Tensor& tokens, const at::Tensor& weights, const at::Tensor& ids,
    const std::optional<at::Tensor>& pair_tokens, const ExpertWeights& experts,
    c10::string_view activation, bool gated) {
  const char* op = pair_tokens ? "_moe_ffn_pairs" : "moe_ffn";
  check_assignment(op, tokens, weights, ids, pair_tokens);
  check_expert_weights(op, "tokens", tokens, experts, gated);
  return parse_activation(op, activation, gated);
}

}  // namespace moe_ext
