#include "ops/moe_ffn.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cpu/expert_ffn.h"
#include "cpu/plan.h"

namespace moe_ext::cpu {
namespace {

// operators

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> moe_ffn_forward(
    const at::Tensor& tokens, const at::Tensor& topk_weights, const at::Tensor& topk_ids,
    const at::Tensor& gate_up_proj, const at::Tensor& down_proj,
    const std::optional<at::Tensor>& gate_up_bias, const std::optional<at::Tensor>& down_bias,
    c10::string_view activation, bool gated, bool save_hidden) {
  constexpr const char* op = "moe_ffn";
  const ExpertWeights experts{gate_up_proj, down_proj, gate_up_bias, down_bias};
  const Activation parsed =
      check_moe_ffn(tokens, topk_weights, topk_ids, experts, activation, gated);
  const Plan plan = make_plan(op, topk_ids, gate_up_proj.size(0));
  const ExpertRows rows = moe_rows(
      op, plan.row_map, plan.expert_offsets, topk_weights, compute_dtype(tokens.scalar_type()));
  const at::Tensor out = at::empty(tokens.sizes(), tokens.options());
  const at::Tensor hidden =
      save_hidden ? empty_hidden(tokens, plan.row_map.numel(), gate_up_proj) : at::Tensor();
  expert_ffn_forward(tokens, rows, experts, parsed, gated, out, hidden);
  return {out, hidden, plan.row_map, plan.expert_offsets};
}

at::Tensor moe_ffn(
    const at::Tensor& tokens, const at::Tensor& topk_weights, const at::Tensor& topk_ids,
    const at::Tensor& gate_up_proj, const at::Tensor& down_proj,
    const std::optional<at::Tensor>& gate_up_bias, const std::optional<at::Tensor>& down_bias,
    c10::string_view activation, bool gated, c10::string_view recompute) {
  parse_recompute("moe_ffn", recompute);
  return std::get<0>(moe_ffn_forward(
      tokens, topk_weights, topk_ids, gate_up_proj, down_proj, gate_up_bias, down_bias, activation,
      gated, false));
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, CPU, m) {
  m.impl("moe_ffn", moe_ffn);
  m.impl("_moe_ffn_forward", moe_ffn_forward);
}

}  // namespace moe_ext::cpu
