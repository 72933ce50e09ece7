// What expert_ffn, moe_ffn and _moe_ffn_pairs share: the experts' arguments, what backward needs,
// and the backward operator.
#pragma once

#include <array>
#include <mutex>

#include "autograd/grad_accumulation.h"

namespace moe_ext::autograd {

// The experts' weights and what is done with them, below the schemas.
struct Experts {
  const Tensor& gate_up_proj;
  const Tensor& down_proj;
  const OptionalTensor& gate_up_bias;
  const OptionalTensor& down_bias;
  c10::string_view activation;
  bool gated;

  bool will_backward() const {
    return autograd::will_backward(gate_up_proj, down_proj, gate_up_bias, down_bias);
  }
};

// The tensors that backward needs; those that are absent are undefined. `hidden` is so where it is
// computed again, and row_map where the rows are grouped already (expert_ffn).
struct SavedExperts {
  Tensor tokens, weights, row_map, pair_tokens, expert_offsets, hidden;
  Tensor gate_up_proj, down_proj, gate_up_bias, down_bias;

  // With the experts, which the caller has not set.
  void save(AutogradContext* ctx, const Experts& experts) {
    gate_up_proj = experts.gate_up_proj;
    down_proj = experts.down_proj;
    gate_up_bias = experts.gate_up_bias.value_or(Tensor());
    down_bias = experts.down_bias.value_or(Tensor());
    ctx->save_for_backward(list());
    ctx->saved_data["activation"] = std::string(experts.activation);
    ctx->saved_data["gated"] = experts.gated;
    ctx->set_materialize_grads(false);
  }
  static SavedExperts load(const AutogradContext* ctx) {
    const variable_list saved = ctx->get_saved_variables();
    SavedExperts experts;
    size_t i = 0;
    for (Tensor* field : experts.fields()) *field = saved[i++];
    return experts;
  }

  variable_list list() {
    variable_list list;
    for (const Tensor* field : fields()) list.push_back(*field);
    return list;
  }

 private:
  std::array<Tensor*, 10> fields() {
    return {&tokens, &weights,      &row_map,   &pair_tokens,  &expert_offsets,
            &hidden, &gate_up_proj, &down_proj, &gate_up_bias, &down_bias};
  }
};

// Of tokens, weights, gate_up_proj, down_proj, gate_up_bias, down_bias.
using ExpertGrads = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// The backward operators; that which adds takes more.
template <class... More>
using ExpertsBackward = ExpertGrads(
    const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
    const OptionalTensor&, const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&,
    const OptionalTensor&, const OptionalTensor&, c10::string_view, bool, std::array<bool, 6>,
    More...);

// With targets for gate_up_proj and down_proj their gradients are added there, and the outputs are
// what autograd gets instead.
inline ExpertGrads experts_backward(
    AutogradContext* ctx, const Tensor& grad_out, const SavedExperts& saved,
    std::array<bool, 6> output_mask, const std::array<GradTarget, 2>& targets = {}) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const auto call = [&](const auto& op, const auto&... more) {
    return op.call(
        grad_out, saved.tokens, as_optional(saved.weights), as_optional(saved.row_map),
        as_optional(saved.pair_tokens), saved.expert_offsets, as_optional(saved.hidden),
        saved.gate_up_proj, saved.down_proj, as_optional(saved.gate_up_bias),
        as_optional(saved.down_bias), ctx->saved_data["activation"].toStringView(),
        ctx->saved_data["gated"].toBool(), output_mask, more...);
  };
  if (!targets[0].sum.defined() && !targets[1].sum.defined()) {
    static const auto op = find_op<ExpertsBackward<>>("moe_ext::_expert_ffn_backward");
    return call(op);
  }
  static const auto adding_op =
      find_op<ExpertsBackward<const OptionalTensor&, const OptionalTensor&>>(
          "moe_ext::_expert_ffn_backward_into");
  ExpertGrads grads;
  {
    // Threads may run backward of the same parameters at once; autograd adds under a lock too.
    static std::mutex adding;
    const std::lock_guard<std::mutex> lock(adding);
    grads = call(adding_op, as_optional(targets[0].sum), as_optional(targets[1].sum));
  }
  if (targets[0].sum.defined()) std::get<2>(grads) = targets[0].finish();
  if (targets[1].sum.defined()) std::get<3>(grads) = targets[1].finish();
  return grads;
}

// The operators below get save_hidden instead of recompute, so an unknown one is refused here.
inline void check_recompute(const char* op, c10::string_view recompute) {
  TORCH_CHECK_VALUE(
      recompute == "activation" || recompute == "hidden", op,
      ": recompute must be activation or hidden, got ", recompute);
}

// Whether hidden is kept for backward, if there will be one; else it is computed again.
inline bool keeps_hidden(const char* op, c10::string_view recompute) {
  check_recompute(op, recompute);
  return recompute == "activation";
}

}  // namespace moe_ext::autograd
