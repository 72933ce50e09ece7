#include "autograd/function.h"

namespace moe_ext::autograd {
namespace {

// topk_router and _router_weights have one derivative: that of the weights and probabilities by
// the logits, the choice being fixed.
void save_router(
    AutogradContext* ctx, const Tensor& router_logits, const Tensor& topk_ids,
    c10::string_view score_function, bool renormalize, double scaling_factor) {
  if (!ctx) return;
  ctx->save_for_backward({router_logits, topk_ids});
  ctx->saved_data["score_function"] = std::string(score_function);
  ctx->saved_data["renormalize"] = renormalize;
  ctx->saved_data["scaling_factor"] = scaling_factor;
  ctx->set_materialize_grads(false);
}

Tensor router_backward(
    AutogradContext* ctx, const variable_list& saved, const Tensor& grad_weights,
    const Tensor& grad_probs) {
  const auto [router_logits, topk_ids] = named<2>(saved);
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  static const auto op = find_op<Tensor(
      const OptionalTensor&, const OptionalTensor&, const Tensor&, const Tensor&, c10::string_view,
      bool, double)>("moe_ext::_router_weights_backward");
  return op.call(
      as_optional(grad_weights), as_optional(grad_probs), router_logits, topk_ids,
      ctx->saved_data["score_function"].toStringView(), ctx->saved_data["renormalize"].toBool(),
      ctx->saved_data["scaling_factor"].toDouble());
}

class TopkRouter : public torch::autograd::Function<TopkRouter> {
 public:
  static variable_list forward(
      AutogradContext* ctx, const Tensor& router_logits, const c10::SymInt& top_k,
      c10::string_view score_function, bool renormalize, double scaling_factor,
      const OptionalTensor& expert_bias, int64_t num_groups, int64_t topk_groups) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    static const auto op = find_op<std::tuple<Tensor, Tensor, Tensor>(
        const Tensor&, c10::SymInt, c10::string_view, bool, double, const OptionalTensor&, int64_t,
        int64_t)>("moe_ext::topk_router");
    auto [weights, ids, probs] = op.call(
        router_logits, top_k, score_function, renormalize, scaling_factor, expert_bias, num_groups,
        topk_groups);
    save_router(ctx, router_logits, ids, score_function, renormalize, scaling_factor);
    if (ctx) ctx->mark_non_differentiable({ids});
    return {weights, ids, probs};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    variable_list grads(8);
    if (!grad[0].defined() && !grad[2].defined()) return grads;
    const auto saved = ctx->get_saved_variables();
    grads[0] = router_backward(ctx, saved, grad[0], grad[2]);
    return once_differentiable("topk_router", std::move(grads), grad, saved);
  }
};

class RouterWeights : public torch::autograd::Function<RouterWeights> {
 public:
  static variable_list forward(
      AutogradContext* ctx, const Tensor& router_logits, const Tensor& topk_ids,
      c10::string_view score_function, bool renormalize, double scaling_factor) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    static const auto op = find_op<std::tuple<Tensor, Tensor>(
        const Tensor&, const Tensor&, c10::string_view, bool, double)>("moe_ext::_router_weights");
    auto [weights, probs] =
        op.call(router_logits, topk_ids, score_function, renormalize, scaling_factor);
    save_router(ctx, router_logits, topk_ids, score_function, renormalize, scaling_factor);
    return {weights, probs};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    variable_list grads(5);
    if (!grad[0].defined() && !grad[1].defined()) return grads;
    const auto saved = ctx->get_saved_variables();
    grads[0] = router_backward(ctx, saved, grad[0], grad[1]);
    return once_differentiable("router_weights", std::move(grads), grad, saved);
  }
};

std::tuple<Tensor, Tensor, Tensor> topk_router(
    const Tensor& router_logits, c10::SymInt top_k, c10::string_view score_function,
    bool renormalize, double scaling_factor, const OptionalTensor& expert_bias, int64_t num_groups,
    int64_t topk_groups) {
  check_defined("topk_router", {{"router_logits", router_logits}});
  const auto out = apply<TopkRouter>(
      router_logits, top_k, score_function, renormalize, scaling_factor, expert_bias, num_groups,
      topk_groups);
  return {out[0], out[1], out[2]};
}

std::tuple<Tensor, Tensor> router_weights(
    const Tensor& router_logits, const Tensor& topk_ids, c10::string_view score_function,
    bool renormalize, double scaling_factor) {
  check_defined("_router_weights", {{"router_logits", router_logits}, {"topk_ids", topk_ids}});
  const auto out =
      apply<RouterWeights>(router_logits, topk_ids, score_function, renormalize, scaling_factor);
  return {out[0], out[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, Autograd, m) {
  m.impl("topk_router", topk_router);
  m.impl("_router_weights", router_weights);
}

}  // namespace moe_ext::autograd
