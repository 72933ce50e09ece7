#include "autograd/experts.h"

namespace moe_ext::autograd {
namespace {

// out, hidden, row_map, expert_offsets of moe_ffn, and, with pair_tokens, of _moe_ffn_pairs.
std::tuple<Tensor, Tensor, Tensor, Tensor> forward_op(
    const Tensor& tokens, const Tensor& weights, const Tensor& ids,
    const OptionalTensor& pair_tokens, const Experts& experts, bool save_hidden) {
  static const auto op = find_op<std::tuple<Tensor, Tensor, Tensor, Tensor>(
      const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&,
      const Tensor&, const OptionalTensor&, const OptionalTensor&, c10::string_view, bool, bool)>(
      "moe_ext::_moe_ffn_forward");
  return op.call(
      tokens, weights, ids, pair_tokens, experts.gate_up_proj, experts.down_proj,
      experts.gate_up_bias, experts.down_bias, experts.activation, experts.gated, save_hidden);
}

class MoeFfn : public torch::autograd::Function<MoeFfn> {
 public:
  static Tensor forward(
      AutogradContext* ctx, const Tensor& tokens, const Tensor& weights, const Tensor& ids,
      const Tensor& gate_up_proj, const Tensor& down_proj, const OptionalTensor& gate_up_bias,
      const OptionalTensor& down_bias, const OptionalTensor& pair_tokens,
      c10::string_view activation, bool gated, bool save_hidden, bool fuse_grad_accumulation) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const Experts experts{gate_up_proj, down_proj, gate_up_bias, down_bias, activation, gated};
    const auto [out, hidden, row_map, expert_offsets] =
        forward_op(tokens, weights, ids, pair_tokens, experts, save_hidden);
    if (!ctx) return out;
    SavedExperts saved;
    saved.tokens = tokens;
    saved.weights = weights;
    saved.row_map = row_map;
    saved.pair_tokens = pair_tokens.value_or(Tensor());
    saved.expert_offsets = expert_offsets;
    if (save_hidden) saved.hidden = hidden;
    saved.save(ctx, experts);
    ctx->saved_data["fuse_grad_accumulation"] = fuse_grad_accumulation;
    return out;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    variable_list grads(12);
    if (!grad[0].defined()) return grads;
    SavedExperts saved = SavedExperts::load(ctx);
    NeedsGrad needs(ctx);
    const bool tokens = needs.next();
    const bool weights = needs.next();
    needs.next();
    const bool gate_up = needs.next();
    const bool down = needs.next();
    const bool gate_up_bias = needs.next(saved.gate_up_bias.defined());
    const bool down_bias = needs.next(saved.down_bias.defined());
    std::array<GradTarget, 2> targets;
    if (ctx->saved_data["fuse_grad_accumulation"].toBool()) {
      const bool gated = ctx->saved_data["gated"].toBool();
      if (gate_up) targets[0] = target_of(ctx, gated ? "gate_up_proj" : "up_proj", 3);
      if (down) targets[1] = target_of(ctx, "down_proj", 4);
    }
    std::tie(grads[0], grads[1], grads[3], grads[4], grads[5], grads[6]) = experts_backward(
        ctx, grad[0], saved, {tokens, weights, gate_up, down, gate_up_bias, down_bias}, targets);
    return once_differentiable("moe_ffn", std::move(grads), grad, saved.list());
  }

 private:
  // Of input `index`.
  static GradTarget target_of(const AutogradContext* ctx, const char* name, size_t index) {
    const auto* edge = accumulating_edge<MoeFfn>(ctx, index);
    return edge ? find_target("moe_ffn", name, *edge) : GradTarget();
  }
};

Tensor apply(
    const char* name, const Tensor& tokens, const Tensor& weights, const Tensor& ids,
    const OptionalTensor& pair_tokens, const Experts& experts, c10::string_view recompute,
    bool fuse_grad_accumulation) {
  const bool save_hidden =
      keeps_hidden(name, recompute) && (experts.will_backward() || will_backward(tokens, weights));
  return autograd::apply<MoeFfn>(
      tokens, weights, ids, experts.gate_up_proj, experts.down_proj, experts.gate_up_bias,
      experts.down_bias, pair_tokens, experts.activation, experts.gated, save_hidden,
      fuse_grad_accumulation);
}

Tensor moe_ffn(
    const Tensor& tokens, const Tensor& topk_weights, const Tensor& topk_ids,
    const Tensor& gate_up_proj, const Tensor& down_proj, const OptionalTensor& gate_up_bias,
    const OptionalTensor& down_bias, c10::string_view activation, bool gated,
    c10::string_view recompute, bool fuse_grad_accumulation) {
  check_defined(
      "moe_ffn", {{"tokens", tokens},
                  {"topk_weights", topk_weights},
                  {"topk_ids", topk_ids},
                  {"gate_up_proj", gate_up_proj},
                  {"down_proj", down_proj}});
  return apply(
      "moe_ffn", tokens, topk_weights, topk_ids, std::nullopt,
      {gate_up_proj, down_proj, gate_up_bias, down_bias, activation, gated}, recompute,
      fuse_grad_accumulation);
}

Tensor moe_ffn_pairs(
    const Tensor& tokens, const Tensor& pair_weights, const Tensor& pair_experts,
    const Tensor& pair_tokens, const Tensor& gate_up_proj, const Tensor& down_proj,
    const OptionalTensor& gate_up_bias, const OptionalTensor& down_bias,
    c10::string_view activation, bool gated, c10::string_view recompute,
    bool fuse_grad_accumulation) {
  check_defined(
      "_moe_ffn_pairs", {{"tokens", tokens},
                         {"pair_weights", pair_weights},
                         {"pair_experts", pair_experts},
                         {"pair_tokens", pair_tokens},
                         {"gate_up_proj", gate_up_proj},
                         {"down_proj", down_proj}});
  return apply(
      "_moe_ffn_pairs", tokens, pair_weights, pair_experts, pair_tokens,
      {gate_up_proj, down_proj, gate_up_bias, down_bias, activation, gated}, recompute,
      fuse_grad_accumulation);
}

Tensor moe_ffn_below_autograd(
    const Tensor& tokens, const Tensor& topk_weights, const Tensor& topk_ids,
    const Tensor& gate_up_proj, const Tensor& down_proj, const OptionalTensor& gate_up_bias,
    const OptionalTensor& down_bias, c10::string_view activation, bool gated,
    c10::string_view recompute, bool) {
  check_recompute("moe_ffn", recompute);
  return std::get<0>(forward_op(
      tokens, topk_weights, topk_ids, std::nullopt,
      {gate_up_proj, down_proj, gate_up_bias, down_bias, activation, gated}, false));
}

Tensor moe_ffn_pairs_below_autograd(
    const Tensor& tokens, const Tensor& pair_weights, const Tensor& pair_experts,
    const Tensor& pair_tokens, const Tensor& gate_up_proj, const Tensor& down_proj,
    const OptionalTensor& gate_up_bias, const OptionalTensor& down_bias,
    c10::string_view activation, bool gated, c10::string_view recompute, bool) {
  check_recompute("_moe_ffn_pairs", recompute);
  return std::get<0>(forward_op(
      tokens, pair_weights, pair_experts, pair_tokens,
      {gate_up_proj, down_proj, gate_up_bias, down_bias, activation, gated}, false));
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, Autograd, m) {
  m.impl("moe_ffn", moe_ffn);
  m.impl("_moe_ffn_pairs", moe_ffn_pairs);
}
TORCH_LIBRARY_IMPL(moe_ext, CompositeExplicitAutograd, m) {
  m.impl("moe_ffn", moe_ffn_below_autograd);
  m.impl("_moe_ffn_pairs", moe_ffn_pairs_below_autograd);
}

}  // namespace moe_ext::autograd
