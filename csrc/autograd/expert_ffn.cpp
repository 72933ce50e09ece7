#include "autograd/experts.h"

namespace moe_ext::autograd {
namespace {

std::tuple<Tensor, Tensor> forward_op(
    const Tensor& rows, const Tensor& expert_offsets, const Experts& experts,
    const OptionalTensor& row_weights, bool save_hidden) {
  static const auto op = find_op<std::tuple<Tensor, Tensor>(
      const Tensor&, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
      const OptionalTensor&, const OptionalTensor&, c10::string_view, bool, bool)>(
      "moe_ext::_expert_ffn_forward");
  return op.call(
      rows, expert_offsets, experts.gate_up_proj, experts.down_proj, experts.gate_up_bias,
      experts.down_bias, row_weights, experts.activation, experts.gated, save_hidden);
}

class ExpertFfn : public torch::autograd::Function<ExpertFfn> {
 public:
  static Tensor forward(
      AutogradContext* ctx, const Tensor& rows, const Tensor& expert_offsets,
      const Tensor& gate_up_proj, const Tensor& down_proj, const OptionalTensor& gate_up_bias,
      const OptionalTensor& down_bias, const OptionalTensor& row_weights,
      c10::string_view activation, bool gated, bool save_hidden) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const Experts experts{gate_up_proj, down_proj, gate_up_bias, down_bias, activation, gated};
    const auto [out, hidden] = forward_op(rows, expert_offsets, experts, row_weights, save_hidden);
    if (!ctx) return out;
    SavedExperts saved;
    saved.tokens = rows;
    saved.weights = row_weights.value_or(Tensor());
    saved.expert_offsets = expert_offsets;
    if (save_hidden) saved.hidden = hidden;
    saved.save(ctx, experts);
    return out;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    variable_list grads(10);
    if (!grad[0].defined()) return grads;
    SavedExperts saved = SavedExperts::load(ctx);
    NeedsGrad needs(ctx);
    const bool rows = needs.next();
    needs.next();
    const bool gate_up = needs.next();
    const bool down = needs.next();
    const bool gate_up_bias = needs.next(saved.gate_up_bias.defined());
    const bool down_bias = needs.next(saved.down_bias.defined());
    const bool row_weights = needs.next(saved.weights.defined());
    std::tie(grads[0], grads[6], grads[2], grads[3], grads[4], grads[5]) = experts_backward(
        ctx, grad[0], saved, {rows, row_weights, gate_up, down, gate_up_bias, down_bias});
    return once_differentiable("expert_ffn", std::move(grads), grad, saved.list());
  }
};

Tensor expert_ffn(
    const Tensor& rows, const Tensor& expert_offsets, const Tensor& gate_up_proj,
    const Tensor& down_proj, const OptionalTensor& gate_up_bias, const OptionalTensor& down_bias,
    const OptionalTensor& row_weights, c10::string_view activation, bool gated,
    c10::string_view recompute) {
  check_defined(
      "expert_ffn", {{"rows", rows},
                     {"expert_offsets", expert_offsets},
                     {"gate_up_proj", gate_up_proj},
                     {"down_proj", down_proj}});
  const Experts experts{gate_up_proj, down_proj, gate_up_bias, down_bias, activation, gated};
  const bool save_hidden = keeps_hidden("expert_ffn", recompute) &&
                           (experts.will_backward() || will_backward(rows, row_weights));
  return apply<ExpertFfn>(
      rows, expert_offsets, gate_up_proj, down_proj, gate_up_bias, down_bias, row_weights,
      activation, gated, save_hidden);
}

Tensor expert_ffn_below_autograd(
    const Tensor& rows, const Tensor& expert_offsets, const Tensor& gate_up_proj,
    const Tensor& down_proj, const OptionalTensor& gate_up_bias, const OptionalTensor& down_bias,
    const OptionalTensor& row_weights, c10::string_view activation, bool gated,
    c10::string_view recompute) {
  check_recompute("expert_ffn", recompute);
  const Experts experts{gate_up_proj, down_proj, gate_up_bias, down_bias, activation, gated};
  return std::get<0>(forward_op(rows, expert_offsets, experts, row_weights, false));
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, Autograd, m) { m.impl("expert_ffn", expert_ffn); }
TORCH_LIBRARY_IMPL(moe_ext, CompositeExplicitAutograd, m) {
  m.impl("expert_ffn", expert_ffn_below_autograd);
}

}  // namespace moe_ext::autograd
