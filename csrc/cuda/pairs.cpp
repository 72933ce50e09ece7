#include "ops/pairs.h"

#include <torch/library.h>

#include "cuda/operands.h"

namespace moe_ext::cuda {
namespace {

kernels::PairList pair_list(
    const at::Tensor& tokens, const at::Tensor& experts, const at::Tensor& slots) {
  return {
      tokens.numel(), tokens.const_data_ptr<int64_t>(), experts.const_data_ptr<int64_t>(),
      data_or_null<int64_t>(slots)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> round_tokens(
    const at::Tensor& router_probs, const at::Tensor& topk_weights, const at::Tensor& topk_ids,
    int64_t tile_size, c10::string_view rounding, const std::optional<at::Tensor>& capacity_factor,
    int64_t min_capacity, const std::optional<at::Tensor>& noise_) {
  const Rounding parsed = check_round_tokens(
      router_probs, topk_weights, topk_ids, tile_size, rounding, capacity_factor, min_capacity,
      noise_);
  check_count("_round_tokens", "topk_ids", "slots", topk_ids.numel());
  const c10::cuda::CUDAGuard device_guard(router_probs.device());
  const at::ScalarType dtype = compute_dtype(router_probs.scalar_type());
  const at::Tensor probs = contiguous_in(router_probs, dtype);
  const at::Tensor weights = contiguous_in(topk_weights, dtype);
  const at::Tensor ids = contiguous_in(topk_ids, at::kLong);
  const at::Tensor noise = contiguous_in(noise_, at::kDouble);
  const auto outputs = empty_round_tokens_outputs(router_probs, topk_ids, tile_size, parsed);
  const auto& [pair_tokens, pair_experts, pair_slots, kept_ids] = outputs;
  const kernels::RoundArgs args{
      {ids.size(0), ids.size(1), probs.size(1), ids.const_data_ptr<int64_t>(),
       capacity_factor ? capacity_factor->const_data_ptr<double>() : nullptr, min_capacity},
      tile_size,
      parsed,
      data_or_null<double>(noise)};
  const at::Tensor workspace =
      empty_workspace(kernels::capacity_workspace(type_of(probs), args.capacity), ids);
  kernels::round_tokens(
      type_of(probs), args, probs.const_data_ptr(), weights.const_data_ptr(),
      {pair_tokens.numel(), pair_tokens.mutable_data_ptr<int64_t>(),
       pair_experts.mutable_data_ptr<int64_t>(), pair_slots.mutable_data_ptr<int64_t>()},
      kept_ids.mutable_data_ptr<int64_t>(), workspace.mutable_data_ptr(),
      c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return outputs;
}

std::tuple<at::Tensor, at::Tensor> expert_choice(
    const at::Tensor& router_probs, const std::optional<at::Tensor>& token_mask, int64_t top_k) {
  check_expert_choice(router_probs, token_mask, top_k);
  const c10::cuda::CUDAGuard device_guard(router_probs.device());
  const at::Tensor probs = contiguous_in(router_probs, compute_dtype(router_probs.scalar_type()));
  const at::Tensor mask = contiguous_in(token_mask, at::kBool);
  const auto outputs = empty_expert_choice_outputs(router_probs, top_k);
  const auto& [pair_tokens, pair_experts] = outputs;
  const at::Tensor workspace = empty_workspace(kernels::expert_choice_workspace(), probs);
  kernels::expert_choice(
      type_of(probs), probs.const_data_ptr(), data_or_null<bool>(mask), probs.size(0),
      probs.size(1), top_k,
      {pair_tokens.numel(), pair_tokens.mutable_data_ptr<int64_t>(),
       pair_experts.mutable_data_ptr<int64_t>(), nullptr},
      workspace.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return outputs;
}

at::Tensor pair_weights(
    const at::Tensor& topk_weights_, const at::Tensor& router_probs, const at::Tensor& pair_tokens,
    const at::Tensor& pair_experts, const std::optional<at::Tensor>& pair_slots,
    int64_t num_experts, double scaling_factor) {
  check_pair_weights(
      topk_weights_, router_probs, pair_tokens, pair_experts, pair_slots, num_experts);
  const c10::cuda::CUDAGuard device_guard(router_probs.device());
  const at::Tensor topk_weights = topk_weights_.contiguous(), probs = router_probs.contiguous();
  const at::Tensor tokens = pair_tokens.contiguous(), experts = pair_experts.contiguous();
  const at::Tensor slots = contiguous_in(pair_slots, at::kLong);
  const at::Tensor out = empty_pair_weights(router_probs, pair_tokens);
  kernels::pair_weights(
      type_of(probs), topk_weights.const_data_ptr(), probs.const_data_ptr(),
      pair_list(tokens, experts, slots), num_experts, scaling_factor, out.mutable_data_ptr(),
      c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

std::tuple<at::Tensor, at::Tensor> pair_weights_backward(
    const at::Tensor& grad_, const at::Tensor& topk_weights, const at::Tensor& pair_tokens,
    const at::Tensor& pair_experts, const std::optional<at::Tensor>& pair_slots,
    int64_t num_experts, double scaling_factor, std::array<bool, 2> output_mask) {
  check_pair_weights_backward(
      grad_, topk_weights, pair_tokens, pair_experts, pair_slots, num_experts);
  const c10::cuda::CUDAGuard device_guard(grad_.device());
  const at::Tensor grad = grad_.contiguous();
  const at::Tensor tokens = pair_tokens.contiguous(), experts = pair_experts.contiguous();
  const at::Tensor slots = contiguous_in(pair_slots, at::kLong);
  const auto grads = empty_pair_weights_grads(topk_weights, num_experts, output_mask);
  const auto& [grad_weights, grad_probs] = grads;
  if (grad_weights.defined()) grad_weights.zero_();
  if (grad_probs.defined()) grad_probs.zero_();
  kernels::pair_weights_backward(
      type_of(grad), grad.const_data_ptr(), pair_list(tokens, experts, slots), num_experts,
      scaling_factor, mutable_data_or_null(grad_weights), mutable_data_or_null(grad_probs),
      c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return grads;
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, CUDA, m) {
  m.impl("_round_tokens", round_tokens);
  m.impl("_expert_choice", expert_choice);
  m.impl("_pair_weights", pair_weights);
  m.impl("_pair_weights_backward", pair_weights_backward);
}

}  // namespace moe_ext::cuda
