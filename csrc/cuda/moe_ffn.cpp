#include "ops/moe_ffn.h"

#include <torch/library.h>

#include "cuda/expert_ffn.h"
#include "cuda/unpermute.h"

namespace moe_ext::cuda {
namespace {

// operators

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> moe_ffn_forward(
    const at::Tensor& tokens, const at::Tensor& weights, const at::Tensor& ids,
    const std::optional<at::Tensor>& pair_tokens, const at::Tensor& gate_up_proj,
    const at::Tensor& down_proj, const std::optional<at::Tensor>& gate_up_bias,
    const std::optional<at::Tensor>& down_bias, c10::string_view activation, bool gated,
    bool save_hidden) {
  const char* op = pair_tokens ? "_moe_ffn_pairs" : "moe_ffn";
  const ExpertWeights experts{gate_up_proj, down_proj, gate_up_bias, down_bias};
  const Activation parsed =
      check_moe_ffn(tokens, weights, ids, pair_tokens, experts, activation, gated);
  const c10::cuda::CUDAGuard device_guard(tokens.device());
  const int64_t T = tokens.size(0), E = gate_up_proj.size(0);
  const at::Tensor slot_weights = contiguous_in(weights, compute_dtype(tokens.scalar_type()));
  const Plan plan =
      pair_tokens ? make_pair_plan(op, ids, *pair_tokens, T, E) : make_plan(op, "topk_ids", ids, E);
  const auto [rows, hidden] = expert_rows_forward(
      tokens, routed_rows(plan, pair_tokens), experts, parsed, gated, save_hidden);
  const at::Tensor bias = contiguous_in(down_bias, tokens.scalar_type());
  const at::Tensor out = unpermute_rows(
      rows, plan.row_map, slot_weights, T,
      pair_tokens ? order_by_token(op, *pair_tokens, T, plan.slot_of_row) : TokenOrder{},
      {any_data_or_null(bias), E, plan.expert_offsets.const_data_ptr<int32_t>()});
  return {out, hidden, plan.row_map, plan.expert_offsets};
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, CUDA, m) { m.impl("_moe_ffn_forward", moe_ffn_forward); }

}  // namespace moe_ext::cuda
