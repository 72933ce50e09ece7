// The experts' forward and backward over rows grouped by expert: what expert_ffn and moe_ffn share.
#pragma once

#include "cpu/grouped_rows.h"
#include "ops/expert_ffn.h"

namespace moe_ext::cpu {

// Where an expert row comes from: row r is token `token[r]` with weight `weight[r]`.
struct RowSource {
  std::vector<int64_t> offsets;  // [E + 1], read and checked
  at::Tensor token;              // [N] int32, or undefined: row r is token r
  at::Tensor weight;             // [N] compute dtype, or undefined: 1
};

// out [N, H], of tokens' dtype or of the compute dtype, receives the finished rows, weights
// included; hidden [N, W] the pre-activation, if defined. Rows past offsets[E] are not touched.
void expert_ffn_forward(
    const at::Tensor& tokens, const RowSource& source, const ExpertWeights& experts,
    Activation activation, bool gated, const at::Tensor& out, const at::Tensor& hidden);

// What backward writes; an undefined tensor is not wanted. Rows past offsets[E] are not touched.
struct RowGrads {
  at::Tensor rows;          // [N, H] compute dtype
  at::Tensor weight;        // [N] compute dtype
  at::Tensor gate_up_proj;  // these four in their parameters' shape and dtype
  at::Tensor down_proj;
  at::Tensor gate_up_bias;
  at::Tensor down_bias;
};

// grad_out and tokens [T, H]; hidden [N, W], or undefined: recomputed from the tokens.
void expert_ffn_backward(
    const at::Tensor& grad_out, const at::Tensor& tokens, const RowSource& source,
    const at::Tensor& hidden, const ExpertWeights& experts, Activation activation, bool gated,
    const RowGrads& grads);

}  // namespace moe_ext::cpu
