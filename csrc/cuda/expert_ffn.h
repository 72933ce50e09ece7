// The experts' forward and backward over rows grouped by expert: what expert_ffn and moe_ffn share.
#pragma once

#include <ATen/core/Tensor.h>

#include "cuda/plan.h"
#include "ops/expert_ffn.h"

namespace moe_ext::cuda {

// The tokens that the experts' rows have.
struct RoutedRows {
  at::Tensor expert_offsets;  // [E + 1] int32, contiguous
  int64_t num_rows;
  at::Tensor slot_of_row;   // [N] int32 of a plan; else undefined: row r is slot r and token r
  int64_t K;                // slot s is of token s / K, unless
  at::Tensor token_of_row;  // [N] int32 of pairs says it
};

// Those of a plan: of topk_ids [T, K], or of pairs.
RoutedRows routed_rows(const Plan& plan, const std::optional<at::Tensor>& pair_tokens);

// The experts' results [N, H] of tokens [T, H], without down_bias and weights, undefined at or past
// offsets[E]; and hidden [N, W], which here is without gate_up_bias, undefined unless asked for.
// Biases are added where their sum is used, before it is rounded.
std::tuple<at::Tensor, at::Tensor> expert_rows_forward(
    const at::Tensor& tokens, const RoutedRows& routed, const ExpertWeights& experts,
    Activation activation, bool gated, bool save_hidden);

}  // namespace moe_ext::cuda
