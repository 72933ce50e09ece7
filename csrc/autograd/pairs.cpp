#include "autograd/function.h"

namespace moe_ext::autograd {
namespace {

// The other operators of ops/pairs.h choose, which has no derivative.
class PairWeights : public torch::autograd::Function<PairWeights> {
 public:
  static Tensor forward(
      AutogradContext* ctx, const Tensor& topk_weights, const Tensor& router_probs,
      const Tensor& pair_tokens, const Tensor& pair_experts, const OptionalTensor& pair_slots,
      const c10::SymInt& num_experts, double scaling_factor) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    static const auto op = find_op<Tensor(
        const Tensor&, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
        c10::SymInt, double)>("moe_ext::_pair_weights");
    if (ctx) {
      // The probabilities [T, E] are not needed again, only E.
      ctx->save_for_backward(
          {topk_weights, pair_tokens, pair_experts, pair_slots.value_or(Tensor())});
      ctx->saved_data["num_experts"] = num_experts;
      ctx->saved_data["scaling_factor"] = scaling_factor;
      ctx->set_materialize_grads(false);
    }
    return op.call(
        topk_weights, router_probs, pair_tokens, pair_experts, pair_slots, num_experts,
        scaling_factor);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    variable_list grads(7);
    if (!grad[0].defined()) return grads;
    const auto saved = ctx->get_saved_variables();
    const auto [topk_weights, pair_tokens, pair_experts, pair_slots] = named<4>(saved);
    {
      const at::AutoDispatchBelowADInplaceOrView below_autograd;
      static const auto op = find_op<std::tuple<Tensor, Tensor>(
          const Tensor&, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
          c10::SymInt, double, std::array<bool, 2>)>("moe_ext::_pair_weights_backward");
      std::tie(grads[0], grads[1]) = op.call(
          grad[0], topk_weights, pair_tokens, pair_experts, as_optional(pair_slots),
          ctx->saved_data["num_experts"].toSymInt(), ctx->saved_data["scaling_factor"].toDouble(),
          {ctx->needs_input_grad(0), ctx->needs_input_grad(1)});
    }
    return once_differentiable("pair_weights", std::move(grads), grad, saved);
  }
};

Tensor pair_weights(
    const Tensor& topk_weights, const Tensor& router_probs, const Tensor& pair_tokens,
    const Tensor& pair_experts, const OptionalTensor& pair_slots, c10::SymInt num_experts,
    double scaling_factor) {
  check_defined(
      "_pair_weights", {{"topk_weights", topk_weights},
                        {"router_probs", router_probs},
                        {"pair_tokens", pair_tokens},
                        {"pair_experts", pair_experts}});
  return apply<PairWeights>(
      topk_weights, router_probs, pair_tokens, pair_experts, pair_slots, num_experts,
      scaling_factor);
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, Autograd, m) { m.impl("_pair_weights", pair_weights); }

}  // namespace moe_ext::autograd
