#include "autograd/function.h"

namespace moe_ext::autograd {
namespace {

class Unpermute : public torch::autograd::Function<Unpermute> {
 public:
  static Tensor forward(
      AutogradContext* ctx, const Tensor& rows, const Tensor& row_map,
      const OptionalTensor& topk_weights) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    static const auto op =
        find_op<Tensor(const Tensor&, const Tensor&, const OptionalTensor&)>("moe_ext::unpermute");
    if (ctx) {
      ctx->save_for_backward({rows, row_map, topk_weights.value_or(Tensor())});
      ctx->set_materialize_grads(false);
    }
    return op.call(rows, row_map, topk_weights);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    variable_list grads(3);
    if (!grad[0].defined()) return grads;
    const auto saved = ctx->get_saved_variables();
    const auto [rows, row_map, topk_weights] = named<3>(saved);
    NeedsGrad needs(ctx);
    const bool to_rows = needs.next();
    needs.next();
    const bool to_weights = needs.next(topk_weights.defined());
    {
      const at::AutoDispatchBelowADInplaceOrView below_autograd;
      static const auto op = find_op<std::tuple<Tensor, Tensor>(
          const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, std::array<bool, 2>)>(
          "moe_ext::_unpermute_backward");
      std::tie(grads[0], grads[2]) =
          op.call(grad[0], rows, row_map, as_optional(topk_weights), {to_rows, to_weights});
    }
    return once_differentiable("unpermute", std::move(grads), grad, saved);
  }
};

Tensor unpermute(const Tensor& rows, const Tensor& row_map, const OptionalTensor& topk_weights) {
  check_defined("unpermute", {{"rows", rows}, {"row_map", row_map}});
  return apply<Unpermute>(rows, row_map, topk_weights);
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, Autograd, m) { m.impl("unpermute", unpermute); }

}  // namespace moe_ext::autograd
