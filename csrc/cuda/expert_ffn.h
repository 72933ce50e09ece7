// The experts' forward and backward over rows grouped by expert: what expert_ffn and moe_ffn share.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>

#include "ops/expert_ffn.h"

namespace moe_ext::cuda {

// Where the experts' rows come from: the slots, whose tokens they have.
struct RowSource {
  at::Tensor expert_offsets;  // [E + 1] int32, contiguous
  int64_t num_rows;
  at::Tensor slot_of_row;   // [N] int32 of moe_ffn; else undefined: row r is slot r and token r
  int64_t K;                // slot s is of token s / K, unless
  at::Tensor token_of_row;  // [N] int32 of pairs says it
};

// The experts' results [N, H] of tokens [T, H], without down_bias and weights, undefined at or past
// offsets[E]; and hidden [N, W], which here is without gate_up_bias, undefined unless asked for.
// Biases are added where their sum is used, before it is rounded.
std::tuple<at::Tensor, at::Tensor> expert_rows_forward(
    const at::Tensor& tokens, const RowSource& source, const ExpertWeights& experts,
    Activation activation, bool gated, bool save_hidden);

}  // namespace moe_ext::cuda
