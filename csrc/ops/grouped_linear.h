// _grouped_linear: rows of expert e times weight[e]^T, plus bias[e].
//
//   rows            [N, H]     float, grouped by expert
//   expert_offsets  [E + 1]    int32, ascending from 0, the last at most N
//   weight          [E, O, H]  rows' dtype, any strides
//   bias            [E, O]     rows' dtype, or none
//   out             [N, O]     rows' dtype; rows at or past expert_offsets[E] are zeros and are
//                              not read in `rows`
#pragma once

#include "ops/checks.h"

namespace moe_ext {

inline void check_grouped_linear(
    const at::Tensor& rows, const at::Tensor& expert_offsets, const at::Tensor& weight,
    const std::optional<at::Tensor>& bias) {
  constexpr const char* op = "_grouped_linear";
  check_float(op, "rows", rows);
  check_shape(op, "rows", rows, {{"N"}, {"H"}});
  check_operand(op, "weight", weight, "rows", rows, {{"E"}, {"O"}, {"H", rows.sym_size(1)}});
  check_num_experts(op, "weight's E", weight.sym_size(0));
  check_positive(op, "weight", "O", weight.sym_size(1));
  check_positive(op, "weight", "H", weight.sym_size(2));
  check_offsets(op, expert_offsets, weight.sym_size(0), rows.device());
  if (bias) {
    check_operand(
        op, "bias", *bias, "rows", rows, {{"E", weight.sym_size(0)}, {"O", weight.sym_size(1)}});
  }
}

inline at::Tensor empty_grouped_linear(const at::Tensor& rows, const at::Tensor& weight) {
  return empty_result({rows.sym_size(0), weight.sym_size(1)}, rows.options());
}

inline void check_grouped_linear_backward(
    const at::Tensor& grad_out, const at::Tensor& rows, const at::Tensor& expert_offsets,
    const at::Tensor& weight) {
  check_grouped_linear(rows, expert_offsets, weight, std::nullopt);
  check_operand(
      "_grouped_linear_backward", "grad_out", grad_out, "rows", rows,
      {{"N", rows.sym_size(0)}, {"O", weight.sym_size(1)}});
}

}  // namespace moe_ext
