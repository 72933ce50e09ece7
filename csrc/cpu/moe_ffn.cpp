#include "ops/moe_ffn.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cpu/combine.h"
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
  const ExpertWeights experts{gate_up_proj, down_proj, gate_up_bias, down_bias};
  const Activation parsed =
      check_moe_ffn(tokens, topk_weights, topk_ids, experts, activation, gated);
  const auto [row_map, expert_offsets] = make_plan("moe_ffn", topk_ids, gate_up_proj.size(0));
  const int64_t num_rows = row_map.numel();
  RowSource source{read_offsets("moe_ffn", expert_offsets, num_rows), {}, {}};
  source.token = invert_row_map("moe_ffn", row_map, num_rows)
                     .div(std::max<int64_t>(row_map.size(1), 1), "floor");

  const auto options = tokens.options().dtype(compute_dtype(tokens.scalar_type()));
  const at::Tensor finished = at::empty({num_rows, tokens.size(1)}, options);
  const at::Tensor hidden =
      save_hidden ? empty_hidden(tokens, num_rows, gate_up_proj) : at::Tensor();
  expert_ffn_forward(tokens, source, experts, parsed, gated, finished, hidden);

  const at::Tensor out = at::empty(tokens.sizes(), tokens.options());
  combine(finished, row_map, contiguous_in(topk_weights, finished.scalar_type()), out);
  return {out, hidden, row_map, expert_offsets};
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
