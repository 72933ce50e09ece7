// The experts' forward and backward over rows grouped by expert: what expert_ffn and moe_ffn share.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "cpu/plan.h"
#include "ops/moe_ffn_packed.h"

namespace moe_ext::cpu {

// The experts' rows: of expert e those in [offsets[e], offsets[e + 1]), where each comes from and
// goes to, and what it weighs.
struct RoutedRows {
  std::vector<int64_t> offsets;  // [E + 1]
  std::vector<int32_t> slot;     // of a row, of moe_ffn; else empty
  std::vector<int32_t> token;    // of a row, of moe_ffn; else empty: row r is token r
  at::Tensor weight;             // [N] compute dtype, or undefined: 1

  int64_t size() const { return offsets.back(); }
  const int32_t* token_data() const { return token.empty() ? nullptr : token.data(); }
};

// The rows of moe_ffn: weights [T, K] in slot order, or, with pair_tokens (read_pair_tokens, else
// undefined), [P].
RoutedRows routed_rows(
    Plan&& plan, const at::Tensor& pair_tokens, const at::Tensor& weights, at::ScalarType compute);

// The same, planned here: weights and ids [T, K], or [P] with pair_tokens [P]. The plan's tensors
// go to row_map and expert_offsets unless these are null.
RoutedRows plan_rows(
    const char* op, const at::Tensor& tokens, const at::Tensor& weights, const at::Tensor& ids,
    const std::optional<at::Tensor>& pair_tokens, int64_t E, at::Tensor* row_map = nullptr,
    at::Tensor* expert_offsets = nullptr);

// Of a plan that came as an argument (read_plan): that every row has a token and that an expert's
// rows are in the order of their tokens, on which the kernels rely. Rows that were grouped already
// have no tokens to check.
void check_tokens(const char* op, const RoutedRows& rows);

// out [T, H] receives the weighted sum of each token's rows; hidden [N, W] the pre-activation, if
// defined (rows past the last expert's are not touched).
void experts_forward(
    const at::Tensor& tokens, const RoutedRows& rows, const ExpertWeights& experts,
    Activation activation, bool gated, const at::Tensor& out, const at::Tensor& hidden);

// The same with packed weights, which have no pre-activation to keep.
void packed_experts_forward(
    const at::Tensor& tokens, const RoutedRows& rows, const PackedExpertWeights& experts,
    Activation activation, bool gated, const at::Tensor& out);

// grad_out and tokens [T, H]; hidden [N, W], or undefined: recomputed from the tokens. Writes the
// gradients that are defined; row_weights [N] in the compute dtype, in the order of the rows.
struct RowGrads {
  at::Tensor tokens;
  at::Tensor row_weights;
  at::Tensor gate_up_proj;
  at::Tensor down_proj;
  at::Tensor gate_up_bias;
  at::Tensor down_bias;
  // Of gate_up_proj and down_proj: added, and then the tensor may be of the compute dtype.
  bool adds_gate_up = false, adds_down = false;
};
void experts_backward(
    const at::Tensor& grad_out, const at::Tensor& tokens, const RoutedRows& rows,
    const at::Tensor& hidden, const ExpertWeights& experts, Activation activation, bool gated,
    const RowGrads& grads);

}  // namespace moe_ext::cpu
