// moe_ffn: permute, expert_ffn and unpermute in one; out[t] = sum_k w[t, k] ffn_{ids[t, k]}(x[t]).
//
//   tokens        [T, H]  float
//   topk_weights  [T, K]  float, any of the supported dtypes
//   topk_ids      [T, K]  int64 or int32; -1 or >= E marks a skipped slot
//   weights               as for expert_ffn
//   out           [T, H]  tokens' dtype; summed in fp32 (fp64) in an order that shapes and routing
//                         fix (on the CPU, by expert), rounded once
//   hidden, row_map, expert_offsets  what backward needs: expert_ffn.h, permute.h
#pragma once

#include "ops/expert_ffn.h"
#include "ops/permute.h"

namespace moe_ext {

inline Activation check_moe_ffn(
    const at::Tensor& tokens, const at::Tensor& topk_weights, const at::Tensor& topk_ids,
    const ExpertWeights& weights, c10::string_view activation, bool gated) {
  constexpr const char* op = "moe_ffn";
  check_float(op, "tokens", tokens);
  check_shape(op, "tokens", tokens, {{"T"}, {"H"}});
  check_ids_dtype(op, "topk_ids", topk_ids);
  check_shape(op, "topk_ids", topk_ids, {{"T", tokens.sym_size(0)}, {"K"}});
  check_device(op, "topk_ids", topk_ids, tokens.device());
  check_float(op, "topk_weights", topk_weights);
  check_shape(
      op, "topk_weights", topk_weights, {{"T", tokens.sym_size(0)}, {"K", topk_ids.sym_size(1)}});
  check_device(op, "topk_weights", topk_weights, tokens.device());
  check_expert_weights(op, tokens, weights, gated);
  return parse_activation(op, activation, gated);
}

}  // namespace moe_ext
