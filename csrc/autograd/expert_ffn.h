// The backward that expert_ffn and moe_ffn share.
#pragma once

#include "autograd/function.h"

namespace moe_ext::autograd {

using ExpertFfnGrads = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// What both operators save, in this order. `hidden` is undefined under recompute="hidden" (it has
// no rows then).
inline void save_expert_ffn(
    AutogradContext* ctx, const Tensor& tokens, const OptionalTensor& weights,
    const OptionalTensor& row_map, const OptionalTensor& pair_tokens, const Tensor& expert_offsets,
    const Tensor& hidden, bool save_hidden, const Tensor& gate_up_proj, const Tensor& down_proj,
    const OptionalTensor& gate_up_bias, const OptionalTensor& down_bias,
    c10::string_view activation, bool gated) {
  ctx->save_for_backward(
      {tokens, weights.value_or(Tensor()), row_map.value_or(Tensor()),
       pair_tokens.value_or(Tensor()), expert_offsets, save_hidden ? hidden : Tensor(),
       gate_up_proj, down_proj, gate_up_bias.value_or(Tensor()), down_bias.value_or(Tensor())});
  ctx->saved_data["activation"] = std::string(activation);
  ctx->saved_data["gated"] = gated;
  ctx->set_materialize_grads(false);
}

// Gradients of (tokens, weights, gate_up_proj, down_proj, gate_up_bias, down_bias).
inline ExpertFfnGrads expert_ffn_backward(
    AutogradContext* ctx, const Tensor& grad_out, const variable_list& saved,
    std::array<bool, 6> output_mask) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  static const auto op = find_op<ExpertFfnGrads(
      const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
      const OptionalTensor&, const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&,
      const OptionalTensor&, const OptionalTensor&, c10::string_view, bool, std::array<bool, 6>)>(
      "moe_ext::_expert_ffn_backward");
  return op.call(
      grad_out, saved[0], as_optional(saved[1]), as_optional(saved[2]), as_optional(saved[3]),
      saved[4], as_optional(saved[5]), saved[6], saved[7], as_optional(saved[8]),
      as_optional(saved[9]), ctx->saved_data["activation"].toStringView(),
      ctx->saved_data["gated"].toBool(), output_mask);
}

// hidden is kept for backward if there will be one and it is not to be recomputed. (An unknown
// recompute is refused here, below which only save_hidden is passed on.)
inline bool keeps_hidden(const char* op, c10::string_view recompute) {
  TORCH_CHECK_VALUE(
      recompute == "activation" || recompute == "hidden", op,
      ": recompute must be activation or hidden, got ", recompute);
  return recompute == "activation";
}

}  // namespace moe_ext::autograd
