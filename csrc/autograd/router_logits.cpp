#include "autograd/function.h"

namespace moe_ext::autograd {
namespace {

class RouterLogits : public torch::autograd::Function<RouterLogits> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& tokens, const Tensor& weight) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    static const auto op = find_op<Tensor(const Tensor&, const Tensor&)>("moe_ext::_router_logits");
    if (ctx) {
      ctx->save_for_backward({tokens, weight});
      ctx->set_materialize_grads(false);
    }
    return op.call(tokens, weight);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    variable_list grads(2);
    if (!grad[0].defined()) return grads;
    const auto saved = ctx->get_saved_variables();
    const auto [tokens, weight] = named<2>(saved);
    {
      const at::AutoDispatchBelowADInplaceOrView below_autograd;
      static const auto op = find_op<std::tuple<Tensor, Tensor>(
          const Tensor&, const Tensor&, const Tensor&, std::array<bool, 2>)>(
          "moe_ext::_router_logits_backward");
      std::tie(grads[0], grads[1]) =
          op.call(grad[0], tokens, weight, {ctx->needs_input_grad(0), ctx->needs_input_grad(1)});
    }
    return once_differentiable("router_logits", std::move(grads), grad, saved);
  }
};

Tensor router_logits(const Tensor& tokens, const Tensor& weight) {
  check_defined("_router_logits", {{"tokens", tokens}, {"weight", weight}});
  return apply<RouterLogits>(tokens, weight);
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, Autograd, m) { m.impl("_router_logits", router_logits); }

}  // namespace moe_ext::autograd
