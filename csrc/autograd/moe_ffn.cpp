#include "autograd/expert_ffn.h"

namespace moe_ext::autograd {
namespace {

// moe_ffn, and, with pair_tokens, _moe_ffn_pairs.
class MoeFfn : public torch::autograd::Function<MoeFfn> {
 public:
  static Tensor forward(
      AutogradContext* ctx, const Tensor& tokens, const Tensor& weights, const Tensor& ids,
      const Tensor& gate_up_proj, const Tensor& down_proj, const OptionalTensor& gate_up_bias,
      const OptionalTensor& down_bias, const OptionalTensor& pair_tokens,
      c10::string_view activation, bool gated, bool save_hidden) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    static const auto op = find_op<std::tuple<Tensor, Tensor, Tensor, Tensor>(
        const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&,
        const Tensor&, const OptionalTensor&, const OptionalTensor&, c10::string_view, bool, bool)>(
        "moe_ext::_moe_ffn_forward");
    const auto [out, hidden, row_map, expert_offsets] = op.call(
        tokens, weights, ids, pair_tokens, gate_up_proj, down_proj, gate_up_bias, down_bias,
        activation, gated, save_hidden);
    save_expert_ffn(
        ctx, tokens, weights, row_map, pair_tokens, expert_offsets, hidden, save_hidden,
        gate_up_proj, down_proj, gate_up_bias, down_bias, activation, gated);
    return out;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    variable_list grads(11);
    if (!grad[0].defined()) return grads;
    const auto saved = ctx->get_saved_variables();
    NeedsGrad needs(ctx);
    const bool tokens = needs.next();
    const bool weights = needs.next();
    needs.next();
    const bool gate_up = needs.next();
    const bool down = needs.next();
    const bool gate_up_bias = needs.next(saved[8].defined());
    const bool down_bias = needs.next(saved[9].defined());
    std::tie(grads[0], grads[1], grads[3], grads[4], grads[5], grads[6]) = expert_ffn_backward(
        ctx, grad[0], saved, {tokens, weights, gate_up, down, gate_up_bias, down_bias});
    return once_differentiable("moe_ffn", std::move(grads), grad, saved);
  }
};

Tensor apply(
    const char* name, const Tensor& tokens, const Tensor& weights, const Tensor& ids,
    const OptionalTensor& pair_tokens, const Tensor& gate_up_proj, const Tensor& down_proj,
    const OptionalTensor& gate_up_bias, const OptionalTensor& down_bias,
    c10::string_view activation, bool gated, c10::string_view recompute) {
  const bool save_hidden =
      keeps_hidden(name, recompute) &&
      will_backward(tokens, weights, gate_up_proj, down_proj, gate_up_bias, down_bias);
  return MoeFfn::apply(
      tokens, weights, ids, gate_up_proj, down_proj, gate_up_bias, down_bias, pair_tokens,
      activation, gated, save_hidden);
}

Tensor moe_ffn(
    const Tensor& tokens, const Tensor& topk_weights, const Tensor& topk_ids,
    const Tensor& gate_up_proj, const Tensor& down_proj, const OptionalTensor& gate_up_bias,
    const OptionalTensor& down_bias, c10::string_view activation, bool gated,
    c10::string_view recompute) {
  check_defined(
      "moe_ffn", {{"tokens", tokens},
                  {"topk_weights", topk_weights},
                  {"topk_ids", topk_ids},
                  {"gate_up_proj", gate_up_proj},
                  {"down_proj", down_proj}});
  return apply(
      "moe_ffn", tokens, topk_weights, topk_ids, std::nullopt, gate_up_proj, down_proj,
      gate_up_bias, down_bias, activation, gated, recompute);
}

Tensor moe_ffn_pairs(
    const Tensor& tokens, const Tensor& pair_weights, const Tensor& pair_experts,
    const Tensor& pair_tokens, const Tensor& gate_up_proj, const Tensor& down_proj,
    const OptionalTensor& gate_up_bias, const OptionalTensor& down_bias,
    c10::string_view activation, bool gated, c10::string_view recompute) {
  check_defined(
      "_moe_ffn_pairs", {{"tokens", tokens},
                         {"pair_weights", pair_weights},
                         {"pair_experts", pair_experts},
                         {"pair_tokens", pair_tokens},
                         {"gate_up_proj", gate_up_proj},
                         {"down_proj", down_proj}});
  return apply(
      "_moe_ffn_pairs", tokens, pair_weights, pair_experts, pair_tokens, gate_up_proj, down_proj,
      gate_up_bias, down_bias, activation, gated, recompute);
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, Autograd, m) {
  m.impl("moe_ffn", moe_ffn);
  m.impl("_moe_ffn_pairs", moe_ffn_pairs);
}

}  // namespace moe_ext::autograd
