#include "ops/expert_ffn.h"

#include <cstring>

#include "cpu/experts.h"
#include "cpu/register.h"

namespace moe_ext::cpu {
namespace {

// The gradients by row [N], to the slots' places in grad_weights; zeros where a slot has no row.
void scatter_to_slots(
    const at::Tensor& by_row_, const RoutedRows& rows, const at::Tensor& grad_weights) {
  grad_weights.zero_();
  const at::Tensor by_row = by_row_.to(grad_weights.scalar_type());
  const char* from = static_cast<const char*>(by_row.const_data_ptr());
  char* to = static_cast<char*>(grad_weights.mutable_data_ptr());
  const int64_t bytes = by_row.element_size();
  for (int64_t r = 0; r < rows.size(); ++r) {
    const int64_t slot = rows.slot.empty() ? r : rows.slot[r];
    std::memcpy(to + slot * bytes, from + r * bytes, bytes);
  }
}

// Rows that are grouped already.
RoutedRows grouped_rows(
    const char* op, const at::Tensor& rows, const at::Tensor& expert_offsets,
    const std::optional<at::Tensor>& weights) {
  return {
      read_offsets(op, expert_offsets, rows.size(0)),
      {},
      {},
      contiguous_in(weights, compute_dtype(rows.scalar_type()))};
}

// operators

std::tuple<at::Tensor, at::Tensor> expert_ffn_forward(
    const at::Tensor& rows, const at::Tensor& expert_offsets, const at::Tensor& gate_up_proj,
    const at::Tensor& down_proj, const std::optional<at::Tensor>& gate_up_bias,
    const std::optional<at::Tensor>& down_bias, const std::optional<at::Tensor>& row_weights,
    c10::string_view activation, bool gated, bool save_hidden) {
  const ExpertWeights experts{gate_up_proj, down_proj, gate_up_bias, down_bias};
  const Activation parsed =
      check_expert_ffn(rows, expert_offsets, experts, row_weights, activation, gated);
  const RoutedRows grouped = grouped_rows("expert_ffn", rows, expert_offsets, row_weights);
  const at::Tensor out = empty_like_contiguous(rows);
  const at::Tensor hidden = empty_hidden(rows, rows.size(0), gate_up_proj, save_hidden);
  experts_forward(rows, grouped, experts, parsed, gated, out, save_hidden ? hidden : at::Tensor());
  return {out, hidden};
}

ExpertFfnGrads expert_ffn_backward_into(
    const at::Tensor& grad_out, const at::Tensor& tokens, const std::optional<at::Tensor>& weights,
    const std::optional<at::Tensor>& row_map, const std::optional<at::Tensor>& pair_tokens_,
    const at::Tensor& expert_offsets, const std::optional<at::Tensor>& hidden,
    const at::Tensor& gate_up_proj, const at::Tensor& down_proj,
    const std::optional<at::Tensor>& gate_up_bias, const std::optional<at::Tensor>& down_bias,
    c10::string_view activation, bool gated, std::array<bool, 6> output_mask,
    const std::optional<at::Tensor>& into_gate_up, const std::optional<at::Tensor>& into_down) {
  constexpr const char* op = "_expert_ffn_backward";
  const ExpertWeights experts{gate_up_proj, down_proj, gate_up_bias, down_bias};
  const Activation parsed = check_expert_ffn_backward(
      grad_out, tokens, weights, row_map, pair_tokens_, expert_offsets, hidden, experts, activation,
      gated);
  check_grad_target("into_gate_up_proj", into_gate_up, gate_up_proj);
  check_grad_target("into_down_proj", into_down, down_proj);
  if (into_gate_up || into_down) {
    const std::initializer_list<std::optional<at::Tensor>> read{
        grad_out, tokens, weights, hidden, gate_up_proj, down_proj, gate_up_bias, down_bias};
    check_shares_no_memory("into_gate_up_proj", into_gate_up, read);
    check_shares_no_memory("into_down_proj", into_down, read);
    check_shares_no_memory("into_down_proj", into_down, {into_gate_up});
  }
  const at::ScalarType compute = compute_dtype(tokens.scalar_type());
  const at::Tensor pair_tokens =
      pair_tokens_ ? read_pair_tokens(op, *pair_tokens_, tokens.size(0)) : at::Tensor();
  const RoutedRows rows =
      row_map ? routed_rows(read_plan(op, *row_map, expert_offsets), pair_tokens, *weights, compute)
              : grouped_rows(op, tokens, expert_offsets, weights);
  check_tokens(op, rows);

  ExpertFfnGrads outputs = empty_expert_ffn_grads(
      tokens, weights, experts, mask_without_targets(output_mask, into_gate_up, into_down));
  auto& [grad_tokens, grad_weights, grad_gate_up, grad_down, grad_gate_up_bias, grad_down_bias] =
      outputs;
  RowGrads grads{
      grad_tokens,
      {},
      into_gate_up.value_or(grad_gate_up),
      into_down.value_or(grad_down),
      grad_gate_up_bias,
      grad_down_bias,
      into_gate_up.has_value(),
      into_down.has_value()};
  if (grad_weights.defined()) {
    grads.row_weights = empty_result({rows.size()}, tokens.options().dtype(compute));
  }
  experts_backward(
      grad_out, tokens, rows, hidden.value_or(at::Tensor()), experts, parsed, gated, grads);
  if (grad_weights.defined()) scatter_to_slots(grads.row_weights, rows, grad_weights);
  return outputs;
}

ExpertFfnGrads expert_ffn_backward(
    const at::Tensor& grad_out, const at::Tensor& tokens, const std::optional<at::Tensor>& weights,
    const std::optional<at::Tensor>& row_map, const std::optional<at::Tensor>& pair_tokens,
    const at::Tensor& expert_offsets, const std::optional<at::Tensor>& hidden,
    const at::Tensor& gate_up_proj, const at::Tensor& down_proj,
    const std::optional<at::Tensor>& gate_up_bias, const std::optional<at::Tensor>& down_bias,
    c10::string_view activation, bool gated, std::array<bool, 6> output_mask) {
  return expert_ffn_backward_into(
      grad_out, tokens, weights, row_map, pair_tokens, expert_offsets, hidden, gate_up_proj,
      down_proj, gate_up_bias, down_bias, activation, gated, output_mask, {}, {});
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, CPU, m) {
  impl<expert_ffn_forward>(m, "_expert_ffn_forward");
  impl<expert_ffn_backward>(m, "_expert_ffn_backward");
  impl<expert_ffn_backward_into>(m, "_expert_ffn_backward_into");
}

}  // namespace moe_ext::cpu
