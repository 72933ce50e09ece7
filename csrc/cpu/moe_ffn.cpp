#include "ops/moe_ffn.h"

#include <ATen/ops/empty.h>

#include "cpu/expert_ffn.h"
#include "cpu/plan.h"
#include "cpu/register.h"

namespace moe_ext::cpu {
namespace {

// operators

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> moe_ffn_forward(
    const at::Tensor& tokens, const at::Tensor& weights, const at::Tensor& ids,
    const std::optional<at::Tensor>& pair_tokens_, const at::Tensor& gate_up_proj,
    const at::Tensor& down_proj, const std::optional<at::Tensor>& gate_up_bias,
    const std::optional<at::Tensor>& down_bias, c10::string_view activation, bool gated,
    bool save_hidden) {
  const char* op = pair_tokens_ ? "_moe_ffn_pairs" : "moe_ffn";
  const ExpertWeights experts{gate_up_proj, down_proj, gate_up_bias, down_bias};
  const Activation parsed =
      check_moe_ffn(tokens, weights, ids, pair_tokens_, experts, activation, gated);
  const int64_t T = tokens.size(0), E = gate_up_proj.size(0);
  const at::Tensor pair_tokens =
      pair_tokens_ ? read_pair_tokens(op, *pair_tokens_, T) : at::Tensor();
  const Plan plan =
      pair_tokens_ ? make_pair_plan(op, ids, pair_tokens, T, E) : make_plan(op, ids, E);
  const ExpertRows rows = moe_rows(
      op, plan.row_map, pair_tokens, plan.expert_offsets, weights,
      compute_dtype(tokens.scalar_type()));
  const at::Tensor out = at::empty(tokens.sizes(), tokens.options());
  const at::Tensor hidden = empty_hidden(tokens, plan.row_map.numel(), gate_up_proj, save_hidden);
  expert_ffn_forward(
      tokens, rows, experts, parsed, gated, out, save_hidden ? hidden : at::Tensor());
  return {out, hidden, plan.row_map, plan.expert_offsets};
}

at::Tensor moe_ffn(
    const at::Tensor& tokens, const at::Tensor& topk_weights, const at::Tensor& topk_ids,
    const at::Tensor& gate_up_proj, const at::Tensor& down_proj,
    const std::optional<at::Tensor>& gate_up_bias, const std::optional<at::Tensor>& down_bias,
    c10::string_view activation, bool gated, c10::string_view recompute) {
  parse_recompute("moe_ffn", recompute);
  return std::get<0>(moe_ffn_forward(
      tokens, topk_weights, topk_ids, std::nullopt, gate_up_proj, down_proj, gate_up_bias,
      down_bias, activation, gated, false));
}

at::Tensor moe_ffn_pairs(
    const at::Tensor& tokens, const at::Tensor& pair_weights, const at::Tensor& pair_experts,
    const at::Tensor& pair_tokens, const at::Tensor& gate_up_proj, const at::Tensor& down_proj,
    const std::optional<at::Tensor>& gate_up_bias, const std::optional<at::Tensor>& down_bias,
    c10::string_view activation, bool gated, c10::string_view recompute) {
  parse_recompute("_moe_ffn_pairs", recompute);
  return std::get<0>(moe_ffn_forward(
      tokens, pair_weights, pair_experts, pair_tokens, gate_up_proj, down_proj, gate_up_bias,
      down_bias, activation, gated, false));
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, CPU, m) {
  impl<moe_ffn>(m, "moe_ffn");
  impl<moe_ffn_pairs>(m, "_moe_ffn_pairs");
  impl<moe_ffn_forward>(m, "_moe_ffn_forward");
}

}  // namespace moe_ext::cpu
