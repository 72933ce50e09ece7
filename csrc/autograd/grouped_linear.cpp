#include "autograd/function.h"

namespace moe_ext::autograd {
namespace {

class GroupedLinear : public torch::autograd::Function<GroupedLinear> {
 public:
  static Tensor forward(
      AutogradContext* ctx, const Tensor& rows, const Tensor& expert_offsets, const Tensor& weight,
      const OptionalTensor& bias) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    static const auto op =
        find_op<Tensor(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&)>(
            "moe_ext::_grouped_linear");
    if (ctx) {
      ctx->save_for_backward({rows, expert_offsets, weight});
      ctx->saved_data["has_bias"] = bias.has_value();
      ctx->set_materialize_grads(false);
    }
    return op.call(rows, expert_offsets, weight, bias);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    variable_list grads(4);
    if (!grad[0].defined()) return grads;
    const auto saved = ctx->get_saved_variables();
    const auto [rows, expert_offsets, weight] = named<3>(saved);
    NeedsGrad needs(ctx);
    const bool to_rows = needs.next();
    needs.next();
    const bool to_weight = needs.next();
    const bool to_bias = needs.next(ctx->saved_data["has_bias"].toBool());
    {
      const at::AutoDispatchBelowADInplaceOrView below_autograd;
      static const auto op = find_op<std::tuple<Tensor, Tensor, Tensor>(
          const Tensor&, const Tensor&, const Tensor&, const Tensor&, std::array<bool, 3>)>(
          "moe_ext::_grouped_linear_backward");
      std::tie(grads[0], grads[2], grads[3]) =
          op.call(grad[0], rows, expert_offsets, weight, {to_rows, to_weight, to_bias});
    }
    return once_differentiable("grouped_linear", std::move(grads), grad, saved);
  }
};

Tensor grouped_linear(
    const Tensor& rows, const Tensor& expert_offsets, const Tensor& weight,
    const OptionalTensor& bias) {
  check_defined(
      "_grouped_linear", {{"rows", rows}, {"expert_offsets", expert_offsets}, {"weight", weight}});
  return apply<GroupedLinear>(rows, expert_offsets, weight, bias);
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, Autograd, m) { m.impl("_grouped_linear", grouped_linear); }

}  // namespace moe_ext::autograd
