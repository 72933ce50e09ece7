#include "autograd/function.h"

namespace moe_ext::autograd {
namespace {

class Permute : public torch::autograd::Function<Permute> {
 public:
  static variable_list forward(
      AutogradContext* ctx, const Tensor& tokens, const Tensor& topk_ids,
      const c10::SymInt& num_experts) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    static const auto op =
        find_op<std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, c10::SymInt)>(
            "moe_ext::permute");
    auto [permuted, row_map, expert_offsets] = op.call(tokens, topk_ids, num_experts);
    if (ctx) {
      ctx->save_for_backward({row_map});
      ctx->mark_non_differentiable({row_map, expert_offsets});
      ctx->set_materialize_grads(false);
    }
    return {permuted, row_map, expert_offsets};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    variable_list grads(3);
    if (!grad[0].defined()) return grads;
    const auto saved = ctx->get_saved_variables();
    const auto [row_map] = named<1>(saved);
    {
      const at::AutoDispatchBelowADInplaceOrView below_autograd;
      static const auto op =
          find_op<Tensor(const Tensor&, const Tensor&)>("moe_ext::_permute_backward");
      grads[0] = op.call(grad[0], row_map);
    }
    return once_differentiable("permute", std::move(grads), grad, saved);
  }
};

std::tuple<Tensor, Tensor, Tensor> permute(
    const Tensor& tokens, const Tensor& topk_ids, c10::SymInt num_experts) {
  check_defined("permute", {{"tokens", tokens}, {"topk_ids", topk_ids}});
  const auto out = apply<Permute>(tokens, topk_ids, num_experts);
  return {out[0], out[1], out[2]};
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, Autograd, m) { m.impl("permute", permute); }

}  // namespace moe_ext::autograd
