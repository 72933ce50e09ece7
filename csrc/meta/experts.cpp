// Output shapes of the operators that move and transform rows, for torch.compile and meta tensors.
#include <torch/library.h>

#include "ops/moe_ffn_packed.h"
#include "ops/unpermute.h"

namespace moe_ext::meta {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> permute(
    const at::Tensor& tokens, const at::Tensor& topk_ids, c10::SymInt num_experts) {
  check_permute(tokens, topk_ids, num_experts);
  const auto [row_map, expert_offsets] = empty_plan(topk_ids, num_experts);
  return {empty_permuted_tokens(tokens, topk_ids), row_map, expert_offsets};
}

at::Tensor permute_backward(const at::Tensor& grad_permuted, const at::Tensor& row_map) {
  check_permute_backward(grad_permuted, row_map);
  return empty_unpermuted(grad_permuted, row_map);
}

at::Tensor unpermute(
    const at::Tensor& rows, const at::Tensor& row_map,
    const std::optional<at::Tensor>& topk_weights) {
  check_unpermute(rows, row_map, topk_weights);
  return empty_unpermuted(rows, row_map);
}

std::tuple<at::Tensor, at::Tensor> unpermute_backward(
    const at::Tensor& grad_out, const at::Tensor& rows, const at::Tensor& row_map,
    const std::optional<at::Tensor>& topk_weights, std::array<bool, 2> output_mask) {
  check_unpermute_backward(grad_out, rows, row_map, topk_weights);
  return {
      output_mask[0] ? empty_like_contiguous(rows) : at::Tensor(),
      output_mask[1] && topk_weights ? empty_like_contiguous(*topk_weights) : at::Tensor()};
}

at::Tensor grouped_linear(
    const at::Tensor& rows, const at::Tensor& expert_offsets, const at::Tensor& weight,
    const std::optional<at::Tensor>& bias) {
  check_grouped_linear(rows, expert_offsets, weight, bias);
  return empty_grouped_linear(rows, weight);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> grouped_linear_backward(
    const at::Tensor& grad_out, const at::Tensor& rows, const at::Tensor& expert_offsets,
    const at::Tensor& weight, std::array<bool, 3> output_mask) {
  check_grouped_linear_backward(grad_out, rows, expert_offsets, weight);
  at::Tensor grad_bias;
  if (output_mask[2]) {
    grad_bias = empty_result({weight.sym_size(0), weight.sym_size(1)}, weight.options());
  }
  return {
      output_mask[0] ? empty_like_contiguous(rows) : at::Tensor(),
      output_mask[1] ? empty_grad_of_weight(weight) : at::Tensor(), grad_bias};
}

std::tuple<at::Tensor, at::Tensor> expert_ffn_forward(
    const at::Tensor& rows, const at::Tensor& expert_offsets, const at::Tensor& gate_up_proj,
    const at::Tensor& down_proj, const std::optional<at::Tensor>& gate_up_bias,
    const std::optional<at::Tensor>& down_bias, const std::optional<at::Tensor>& row_weights,
    c10::string_view activation, bool gated, bool save_hidden) {
  check_expert_ffn(
      rows, expert_offsets, {gate_up_proj, down_proj, gate_up_bias, down_bias}, row_weights,
      activation, gated);
  return {
      empty_like_contiguous(rows), empty_hidden(rows, rows.sym_size(0), gate_up_proj, save_hidden)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> moe_ffn_forward(
    const at::Tensor& tokens, const at::Tensor& weights, const at::Tensor& ids,
    const std::optional<at::Tensor>& pair_tokens, const at::Tensor& gate_up_proj,
    const at::Tensor& down_proj, const std::optional<at::Tensor>& gate_up_bias,
    const std::optional<at::Tensor>& down_bias, c10::string_view activation, bool gated,
    bool save_hidden) {
  check_moe_ffn(
      tokens, weights, ids, pair_tokens, {gate_up_proj, down_proj, gate_up_bias, down_bias},
      activation, gated);
  const auto [row_map, expert_offsets] = empty_plan(ids, gate_up_proj.sym_size(0));
  return {
      empty_like_contiguous(tokens),
      empty_hidden(tokens, ids.sym_numel(), gate_up_proj, save_hidden), row_map, expert_offsets};
}

at::Tensor moe_ffn_packed(
    const at::Tensor& tokens, const at::Tensor& weights, const at::Tensor& ids,
    const std::optional<at::Tensor>& pair_tokens, const at::Tensor& gate_up_packed,
    const at::Tensor& down_packed, const std::optional<at::Tensor>& gate_up_bias,
    const std::optional<at::Tensor>& down_bias, c10::SymInt intermediate_size,
    c10::string_view activation, bool gated) {
  check_moe_ffn_packed(
      tokens, weights, ids, pair_tokens,
      {gate_up_packed, down_packed, gate_up_bias, down_bias, intermediate_size}, activation, gated);
  return empty_like_contiguous(tokens);
}

at::Tensor pack_weights(const at::Tensor& weight, bool gated) {
  check_pack_weights(weight, gated);
  const PackedSizes sizes(
      weight.sym_size(0), weight.sym_size(1), weight.sym_size(2), gated, weight.scalar_type());
  return empty_result(sizes.sizes(), weight.options());
}

at::Tensor unpack_weights(const at::Tensor& packed, c10::SymInt N, c10::SymInt K, bool gated) {
  check_unpack_weights(packed, N, K, gated);
  return empty_result({packed.sym_size(0), N, K}, packed.options());
}

ExpertFfnGrads expert_ffn_backward(
    const at::Tensor& grad_out, const at::Tensor& tokens, const std::optional<at::Tensor>& weights,
    const std::optional<at::Tensor>& row_map, const std::optional<at::Tensor>& pair_tokens,
    const at::Tensor& expert_offsets, const std::optional<at::Tensor>& hidden,
    const at::Tensor& gate_up_proj, const at::Tensor& down_proj,
    const std::optional<at::Tensor>& gate_up_bias, const std::optional<at::Tensor>& down_bias,
    c10::string_view activation, bool gated, std::array<bool, 6> output_mask) {
  const ExpertWeights experts{gate_up_proj, down_proj, gate_up_bias, down_bias};
  check_expert_ffn_backward(
      grad_out, tokens, weights, row_map, pair_tokens, expert_offsets, hidden, experts, activation,
      gated);
  return empty_expert_ffn_grads(tokens, weights, experts, output_mask);
}

ExpertFfnGrads expert_ffn_backward_into(
    const at::Tensor& grad_out, const at::Tensor& tokens, const std::optional<at::Tensor>& weights,
    const std::optional<at::Tensor>& row_map, const std::optional<at::Tensor>& pair_tokens,
    const at::Tensor& expert_offsets, const std::optional<at::Tensor>& hidden,
    const at::Tensor& gate_up_proj, const at::Tensor& down_proj,
    const std::optional<at::Tensor>& gate_up_bias, const std::optional<at::Tensor>& down_bias,
    c10::string_view activation, bool gated, std::array<bool, 6> output_mask,
    const std::optional<at::Tensor>& into_gate_up, const std::optional<at::Tensor>& into_down) {
  const ExpertFfnGrads grads = expert_ffn_backward(
      grad_out, tokens, weights, row_map, pair_tokens, expert_offsets, hidden, gate_up_proj,
      down_proj, gate_up_bias, down_bias, activation, gated,
      mask_without_targets(output_mask, into_gate_up, into_down));
  check_grad_target("into_gate_up_proj", into_gate_up, gate_up_proj);
  check_grad_target("into_down_proj", into_down, down_proj);
  return grads;
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, Meta, m) {
  m.impl("permute", permute);
  m.impl("_permute_backward", permute_backward);
  m.impl("unpermute", unpermute);
  m.impl("_unpermute_backward", unpermute_backward);
  m.impl("_grouped_linear", grouped_linear);
  m.impl("_grouped_linear_backward", grouped_linear_backward);
  m.impl("_expert_ffn_forward", expert_ffn_forward);
  m.impl("_moe_ffn_forward", moe_ffn_forward);
  m.impl("_moe_ffn_packed", moe_ffn_packed);
  m.impl("_pack_weights", pack_weights);
  m.impl("_unpack_weights", unpack_weights);
  m.impl("_expert_ffn_backward", expert_ffn_backward);
  m.impl("_expert_ffn_backward_into", expert_ffn_backward_into);
}

}  // namespace moe_ext::meta
