#include "autograd/expert_ffn.h"

namespace moe_ext::autograd {
namespace {

class ExpertFfn : public torch::autograd::Function<ExpertFfn> {
 public:
  static Tensor forward(
      AutogradContext* ctx, const Tensor& rows, const Tensor& expert_offsets,
      const Tensor& gate_up_proj, const Tensor& down_proj, const OptionalTensor& gate_up_bias,
      const OptionalTensor& down_bias, const OptionalTensor& row_weights,
      c10::string_view activation, bool gated, bool save_hidden) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    static const auto op = find_op<std::tuple<Tensor, Tensor>(
        const Tensor&, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
        const OptionalTensor&, const OptionalTensor&, c10::string_view, bool, bool)>(
        "moe_ext::_expert_ffn_forward");
    const auto [out, hidden] = op.call(
        rows, expert_offsets, gate_up_proj, down_proj, gate_up_bias, down_bias, row_weights,
        activation, gated, save_hidden);
    save_expert_ffn(
        ctx, rows, row_weights, std::nullopt, std::nullopt, expert_offsets, hidden, save_hidden,
        gate_up_proj, down_proj, gate_up_bias, down_bias, activation, gated);
    return out;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    variable_list grads(10);
    if (!grad[0].defined()) return grads;
    const auto saved = ctx->get_saved_variables();
    NeedsGrad needs(ctx);
    const bool rows = needs.next();
    needs.next();
    const bool gate_up = needs.next();
    const bool down = needs.next();
    const bool gate_up_bias = needs.next(saved[8].defined());
    const bool down_bias = needs.next(saved[9].defined());
    const bool row_weights = needs.next(saved[1].defined());
    std::tie(grads[0], grads[6], grads[2], grads[3], grads[4], grads[5]) = expert_ffn_backward(
        ctx, grad[0], saved, {rows, row_weights, gate_up, down, gate_up_bias, down_bias});
    return once_differentiable("expert_ffn", std::move(grads), grad, saved);
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
  const bool save_hidden =
      keeps_hidden("expert_ffn", recompute) &&
      will_backward(rows, gate_up_proj, down_proj, gate_up_bias, down_bias, row_weights);
  return ExpertFfn::apply(
      rows, expert_offsets, gate_up_proj, down_proj, gate_up_bias, down_bias, row_weights,
      activation, gated, save_hidden);
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, Autograd, m) { m.impl("expert_ffn", expert_ffn); }

}  // namespace moe_ext::autograd
