#include "ops/moe_ffn.h"

#include "cpu/experts.h"
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
  at::Tensor row_map, expert_offsets;
  const RoutedRows rows = plan_rows(
      op, tokens, weights, ids, pair_tokens_, gate_up_proj.size(0), &row_map, &expert_offsets);
  const at::Tensor out = empty_like_contiguous(tokens);
  const at::Tensor hidden = empty_hidden(tokens, ids.numel(), gate_up_proj, save_hidden);
  experts_forward(tokens, rows, experts, parsed, gated, out, save_hidden ? hidden : at::Tensor());
  return {out, hidden, row_map, expert_offsets};
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, CPU, m) { impl<moe_ffn_forward>(m, "_moe_ffn_forward"); }

}  // namespace moe_ext::cpu
