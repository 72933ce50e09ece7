#include "autograd/function.h"

namespace moe_ext::autograd {
namespace {

std::tuple<Tensor, Tensor> load_balancing_loss_forward(
    const Tensor& router_probs, const Tensor& topk_ids, const OptionalTensor& token_mask,
    bool normalize_by_topk, const c10::SymInt& num_sequences, const OptionalTensor& expert_share) {
  static const auto op = find_op<std::tuple<Tensor, Tensor>(
      const Tensor&, const Tensor&, const OptionalTensor&, bool, c10::SymInt,
      const OptionalTensor&)>("moe_ext::_load_balancing_loss_forward");
  return op.call(
      router_probs, topk_ids, token_mask, normalize_by_topk, num_sequences, expert_share);
}

class LoadBalancingLoss : public torch::autograd::Function<LoadBalancingLoss> {
 public:
  static Tensor forward(
      AutogradContext* ctx, const Tensor& router_probs, const Tensor& topk_ids,
      const OptionalTensor& token_mask, bool normalize_by_topk, const c10::SymInt& num_sequences,
      const OptionalTensor& expert_share) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const auto [loss, grad_row] = load_balancing_loss_forward(
        router_probs, topk_ids, token_mask, normalize_by_topk, num_sequences, expert_share);
    if (ctx) {
      ctx->save_for_backward({grad_row, topk_ids, token_mask.value_or(Tensor())});
      ctx->saved_data["dtype"] = static_cast<int64_t>(router_probs.scalar_type());
      ctx->set_materialize_grads(false);
    }
    return loss;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    variable_list grads(6);
    if (!grad[0].defined()) return grads;
    const auto saved = ctx->get_saved_variables();
    const auto [grad_row, topk_ids, token_mask] = named<3>(saved);
    {
      const at::AutoDispatchBelowADInplaceOrView below_autograd;
      static const auto op =
          find_op<Tensor(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&)>(
              "moe_ext::_load_balancing_loss_backward");
      const auto dtype = static_cast<at::ScalarType>(ctx->saved_data["dtype"].toInt());
      grads[0] = op.call(grad[0], grad_row, topk_ids, as_optional(token_mask)).to(dtype);
    }
    return once_differentiable("load_balancing_loss", std::move(grads), grad, saved);
  }
};

class RouterZLoss : public torch::autograd::Function<RouterZLoss> {
 public:
  static Tensor forward(
      AutogradContext* ctx, const Tensor& router_logits, const OptionalTensor& token_mask) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    static const auto op =
        find_op<Tensor(const Tensor&, const OptionalTensor&)>("moe_ext::router_z_loss");
    if (ctx) {
      ctx->save_for_backward({router_logits, token_mask.value_or(Tensor())});
      ctx->set_materialize_grads(false);
    }
    return op.call(router_logits, token_mask);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    variable_list grads(2);
    if (!grad[0].defined()) return grads;
    const auto saved = ctx->get_saved_variables();
    const auto [router_logits, token_mask] = named<2>(saved);
    {
      const at::AutoDispatchBelowADInplaceOrView below_autograd;
      static const auto op = find_op<Tensor(const Tensor&, const Tensor&, const OptionalTensor&)>(
          "moe_ext::_router_z_loss_backward");
      grads[0] = op.call(grad[0], router_logits, as_optional(token_mask));
    }
    return once_differentiable("router_z_loss", std::move(grads), grad, saved);
  }
};

Tensor load_balancing_loss(
    const Tensor& router_probs, const Tensor& topk_ids, const OptionalTensor& token_mask,
    bool normalize_by_topk, c10::SymInt num_sequences, const OptionalTensor& expert_share) {
  check_defined("load_balancing_loss", {{"router_probs", router_probs}, {"topk_ids", topk_ids}});
  return apply<LoadBalancingLoss>(
      router_probs, topk_ids, token_mask, normalize_by_topk, num_sequences, expert_share);
}

Tensor load_balancing_loss_below_autograd(
    const Tensor& router_probs, const Tensor& topk_ids, const OptionalTensor& token_mask,
    bool normalize_by_topk, c10::SymInt num_sequences, const OptionalTensor& expert_share) {
  return std::get<0>(load_balancing_loss_forward(
      router_probs, topk_ids, token_mask, normalize_by_topk, num_sequences, expert_share));
}

Tensor router_z_loss(const Tensor& router_logits, const OptionalTensor& token_mask) {
  check_defined("router_z_loss", {{"router_logits", router_logits}});
  return apply<RouterZLoss>(router_logits, token_mask);
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, Autograd, m) {
  m.impl("load_balancing_loss", load_balancing_loss);
  m.impl("router_z_loss", router_z_loss);
}
TORCH_LIBRARY_IMPL(moe_ext, CompositeExplicitAutograd, m) {
  m.impl("load_balancing_loss", load_balancing_loss_below_autograd);
}

}  // namespace moe_ext::autograd
