// expert_ffn: down(act(gate(x)) * up(x)) of each row's expert, over rows grouped by expert.
//
//   rows            [N, H]       float
//   expert_offsets  [E + 1]      int32, ascending from 0, the last at most N
//   gate_up_proj    [E, 2I, H]   rows' dtype; 0..I-1 gate, I..2I-1 up; [E, I, H] if not gated
//   down_proj       [E, H, I]    rows' dtype
//   gate_up_bias    [E, 2I]      rows' dtype or none; [E, I] if not gated
//   down_bias       [E, H]       rows' dtype or none
//   row_weights     [N]          float or none; multiply the finished row, bias included
//   out             [N, H]       rows' dtype; rows at or past expert_offsets[E] are zeros
//   hidden          [N, 2I]      rows' dtype: the pre-activation (on CUDA without gate_up_bias),
//                                [N, I] if not gated; no rows unless asked for; rows at or past
//                                expert_offsets[E] are undefined
#pragma once

#include <ATen/MemoryOverlap.h>

#include <array>
#include <initializer_list>

#include "ops/activation.h"
#include "ops/checks.h"
#include "ops/grouped_linear.h"

namespace moe_ext {

// The experts' weights; one bundle for both operators, both directions.
struct ExpertWeights {
  at::Tensor gate_up_proj;
  at::Tensor down_proj;
  std::optional<at::Tensor> gate_up_bias;
  std::optional<at::Tensor> down_bias;
};

// tokens: the argument named so.
inline void check_expert_biases(
    const char* op, const char* tokens_name, const at::Tensor& tokens,
    const std::optional<at::Tensor>& gate_up_bias, const std::optional<at::Tensor>& down_bias,
    const c10::SymInt& E, const c10::SymInt& width, bool gated) {
  if (gate_up_bias) {
    check_operand(
        op, "gate_up_bias", *gate_up_bias, tokens_name, tokens,
        {{"E", E}, {gated ? "2I" : "I", width}});
  }
  if (down_bias) {
    check_operand(
        op, "down_bias", *down_bias, tokens_name, tokens, {{"E", E}, {"H", tokens.sym_size(1)}});
  }
}

inline void check_expert_weights(
    const char* op, const char* tokens_name, const at::Tensor& tokens, const ExpertWeights& weights,
    bool gated) {
  const c10::SymInt H = tokens.sym_size(1);
  const char* width_letter = gated ? "2I" : "I";
  check_operand(
      op, "gate_up_proj", weights.gate_up_proj, tokens_name, tokens,
      {{"E"}, {width_letter}, {"H", H}});
  const c10::SymInt E = weights.gate_up_proj.sym_size(0);
  const c10::SymInt width = weights.gate_up_proj.sym_size(1);
  check_positive(op, "gate_up_proj", "E", E);
  check_num_experts(op, "gate_up_proj's E", E);
  check_positive(op, "gate_up_proj", width_letter, width);
  check_positive(op, "gate_up_proj", "H", H);
  if (gated) {
    TORCH_SYM_CHECK(
        (width % 2).sym_eq(0), op, ": gate_up_proj must be [E, 2I, H] with an even 2I, got ",
        weights.gate_up_proj.sym_sizes());
  }
  check_operand(
      op, "down_proj", weights.down_proj, tokens_name, tokens,
      {{"E", E}, {"H", H}, {"I", gated ? width / 2 : width}});
  check_expert_biases(
      op, tokens_name, tokens, weights.gate_up_bias, weights.down_bias, E, width, gated);
}

inline Activation check_expert_ffn(
    const at::Tensor& rows, const at::Tensor& expert_offsets, const ExpertWeights& weights,
    const std::optional<at::Tensor>& row_weights, c10::string_view activation, bool gated) {
  constexpr const char* op = "expert_ffn";
  check_float(op, "rows", rows);
  check_shape(op, "rows", rows, {{"N"}, {"H"}});
  check_expert_weights(op, "rows", rows, weights, gated);
  check_offsets(op, expert_offsets, weights.gate_up_proj.sym_size(0), rows.device());
  if (row_weights) {
    check_float(op, "row_weights", *row_weights);
    check_shape(op, "row_weights", *row_weights, {{"N", rows.sym_size(0)}});
    check_device(op, "row_weights", *row_weights, rows.device());
  }
  return parse_activation(op, activation, gated);
}

// No rows unless they are to be saved.
inline at::Tensor empty_hidden(
    const at::Tensor& tokens, const c10::SymInt& num_rows, const at::Tensor& gate_up_proj,
    bool save_hidden) {
  return empty_result(
      {save_hidden ? num_rows : c10::SymInt(0), gate_up_proj.sym_size(1)}, tokens.options());
}

// Gradients of (tokens, weights, gate_up_proj, down_proj, gate_up_bias, down_bias).
using ExpertFfnGrads =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

inline Activation check_expert_ffn_backward(
    const at::Tensor& grad_out, const at::Tensor& tokens, const std::optional<at::Tensor>& weights,
    const std::optional<at::Tensor>& row_map, const std::optional<at::Tensor>& pair_tokens,
    const at::Tensor& expert_offsets, const std::optional<at::Tensor>& hidden,
    const ExpertWeights& experts, c10::string_view activation, bool gated) {
  constexpr const char* op = "_expert_ffn_backward";
  check_float(op, "tokens", tokens);
  check_shape(op, "tokens", tokens, {{"T"}, {"H"}});
  const c10::SymInt T = tokens.sym_size(0);
  check_operand(op, "grad_out", grad_out, "tokens", tokens, {{"T", T}, {"H", tokens.sym_size(1)}});
  check_expert_weights(op, "tokens", tokens, experts, gated);
  check_offsets(op, expert_offsets, experts.gate_up_proj.sym_size(0), tokens.device());
  c10::SymInt num_rows = T;
  if (row_map) {
    check_dtype(op, "row_map", *row_map, at::kInt);
    check_device(op, "row_map", *row_map, tokens.device());
    TORCH_CHECK(weights, op, ": weights must be given with row_map, got None");
    if (pair_tokens) {
      check_shape(op, "row_map", *row_map, {{"P"}});
      check_shape(op, "weights", *weights, {{"P", row_map->sym_size(0)}});
      check_pair_tokens(op, *pair_tokens, *row_map);
      num_rows = row_map->sym_size(0);
    } else {
      check_shape(op, "row_map", *row_map, {{"T", T}, {"K"}});
      check_shape(op, "weights", *weights, {{"T", T}, {"K", row_map->sym_size(1)}});
      num_rows = T * row_map->sym_size(1);
    }
  } else if (weights) {
    check_shape(op, "weights", *weights, {{"N", T}});
  }
  if (weights) {
    check_float(op, "weights", *weights);
    check_device(op, "weights", *weights, tokens.device());
  }
  if (hidden) {
    check_operand(
        op, "hidden", *hidden, "tokens", tokens,
        {{"N", num_rows}, {gated ? "2I" : "I", experts.gate_up_proj.sym_size(1)}});
  }
  return parse_activation(op, activation, gated);
}

// A tensor that the gradient of `weight` is added to, or none.
inline void check_grad_target(
    const char* name, const std::optional<at::Tensor>& target, const at::Tensor& weight) {
  if (!target) return;
  constexpr const char* op = "_expert_ffn_backward_into";
  check_float(op, name, *target);
  const at::ScalarType dtype = weight.scalar_type(), compute = compute_dtype(dtype);
  TORCH_CHECK(
      target->scalar_type() == dtype || target->scalar_type() == compute, op, ": ", name,
      " must be ", dtype, " like its weight or ", compute, ", got ", target->scalar_type());
  check_shape(
      op, name, *target,
      {{"E", weight.sym_size(0)}, {"N", weight.sym_size(1)}, {"K", weight.sym_size(2)}});
  check_device(op, name, *target, weight.device());
  TORCH_CHECK(
      target->is_contiguous() || is_transposed(*target), op, ": ", name,
      " must be contiguous or the transpose of a contiguous tensor, got strides ",
      target->sym_strides());
}

// What is added to is written while others are read.
inline void check_shares_no_memory(
    const char* name, const std::optional<at::Tensor>& target,
    std::initializer_list<std::optional<at::Tensor>> others) {
  for (const std::optional<at::Tensor>& other : others) {
    if (!target || !other) continue;
    const at::MemOverlapStatus overlap = at::get_overlap_status(*target, *other);
    TORCH_CHECK(
        overlap != at::MemOverlapStatus::Full && overlap != at::MemOverlapStatus::Partial,
        "_expert_ffn_backward_into: ", name,
        " must have memory of its own, got memory of another argument");
  }
}

// What _expert_ffn_backward_into returns: of its weights with a target nothing.
inline std::array<bool, 6> mask_without_targets(
    std::array<bool, 6> mask, const std::optional<at::Tensor>& into_gate_up,
    const std::optional<at::Tensor>& into_down) {
  mask[2] = mask[2] && !into_gate_up;
  mask[3] = mask[3] && !into_down;
  return mask;
}

// Gradients of what `mask` asks for, contiguous but for the weights' (empty_grad_of_weight); the
// others stay undefined.
inline ExpertFfnGrads empty_expert_ffn_grads(
    const at::Tensor& tokens, const std::optional<at::Tensor>& weights,
    const ExpertWeights& experts, const std::array<bool, 6>& mask) {
  const auto like = [](bool wanted, const std::optional<at::Tensor>& tensor) {
    return wanted && tensor ? empty_like_contiguous(*tensor) : at::Tensor();
  };
  const auto of_weight = [](bool wanted, const at::Tensor& weight) {
    return wanted ? empty_grad_of_weight(weight) : at::Tensor();
  };
  return {
      like(mask[0], tokens),
      like(mask[1], weights),
      of_weight(mask[2], experts.gate_up_proj),
      of_weight(mask[3], experts.down_proj),
      like(mask[4], experts.gate_up_bias),
      like(mask[5], experts.down_bias)};
}

}  // namespace moe_ext
