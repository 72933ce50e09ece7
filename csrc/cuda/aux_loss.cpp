#include "ops/aux_loss.h"

#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "cuda/operands.h"

namespace moe_ext::cuda {
namespace {

// rows [T, E] in the compute dtype; the tensors must outlive the arguments.
kernels::LossArgs loss_args(
    const at::Tensor& rows, const at::Tensor& mask, const at::Tensor& workspace) {
  return {
      type_of(rows), rows.size(0), rows.size(1), data_or_null<bool>(mask),
      workspace.mutable_data_ptr()};
}

std::tuple<at::Tensor, at::Tensor> load_balancing_loss_forward(
    const at::Tensor& router_probs, const at::Tensor& topk_ids_,
    const std::optional<at::Tensor>& token_mask, bool normalize_by_topk, int64_t num_sequences,
    const std::optional<at::Tensor>& expert_share) {
  check_load_balancing_loss(router_probs, topk_ids_, token_mask, num_sequences, expert_share);
  const c10::cuda::CUDAGuard device_guard(router_probs.device());
  const at::Tensor probs = contiguous_in(router_probs, compute_dtype(router_probs.scalar_type()));
  const at::Tensor topk_ids = topk_ids_.contiguous();
  const at::Tensor share = contiguous_in(expert_share, at::kDouble);
  const at::Tensor mask = contiguous_in(token_mask, at::kBool);
  const at::Tensor workspace =
      empty_workspace(kernels::loss_workspace(num_sequences, probs.size(1)), router_probs);
  const auto outputs = empty_load_balancing_loss_outputs(router_probs, num_sequences);
  kernels::load_balancing_loss(
      loss_args(probs, mask, workspace), probs.const_data_ptr(), id_type_of(topk_ids),
      topk_ids.const_data_ptr(), topk_ids.size(1), normalize_by_topk, num_sequences,
      data_or_null<double>(share), std::get<1>(outputs).mutable_data_ptr(),
      std::get<0>(outputs).mutable_data_ptr(), c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return outputs;
}

at::Tensor load_balancing_loss_backward(
    const at::Tensor& grad_loss_, const at::Tensor& grad_row_, const at::Tensor& topk_ids,
    const std::optional<at::Tensor>& token_mask) {
  check_load_balancing_loss_backward(grad_loss_, grad_row_, topk_ids, token_mask);
  const c10::cuda::CUDAGuard device_guard(grad_row_.device());
  const at::Tensor grad_loss = grad_loss_.contiguous(), grad_row = grad_row_.contiguous();
  const at::Tensor mask = contiguous_in(token_mask, at::kBool);
  const at::Tensor grad_probs = empty_grad_router_probs(grad_row, topk_ids);
  kernels::load_balancing_loss_backward(
      {type_of(grad_row), grad_probs.size(0), grad_probs.size(1), data_or_null<bool>(mask),
       nullptr},
      grad_loss.const_data_ptr(), grad_row.const_data_ptr(), grad_row.size(0),
      grad_probs.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return grad_probs;
}

// One of the means over tokens.
template <class Fn>
at::Tensor mean_over_tokens(
    const at::Tensor& rows_, const std::optional<at::Tensor>& token_mask, const Fn& fn) {
  const c10::cuda::CUDAGuard device_guard(rows_.device());
  const at::Tensor rows = contiguous_in(rows_, compute_dtype(rows_.scalar_type()));
  const at::Tensor mask = contiguous_in(token_mask, at::kBool);
  const at::Tensor workspace = empty_workspace(kernels::loss_workspace(1, rows.size(1)), rows);
  const at::Tensor out = empty_mean(rows);
  fn(loss_args(rows, mask, workspace), rows.const_data_ptr(), out.mutable_data_ptr(),
     c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

at::Tensor router_z_loss(
    const at::Tensor& router_logits, const std::optional<at::Tensor>& token_mask) {
  check_router_z_loss(router_logits, token_mask);
  return mean_over_tokens(router_logits, token_mask, kernels::router_z_loss);
}

at::Tensor router_entropy(
    const at::Tensor& router_probs, const std::optional<at::Tensor>& token_mask) {
  check_router_entropy(router_probs, token_mask);
  return mean_over_tokens(router_probs, token_mask, kernels::router_entropy);
}

at::Tensor router_z_loss_backward(
    const at::Tensor& grad_loss_, const at::Tensor& router_logits,
    const std::optional<at::Tensor>& token_mask) {
  check_router_z_loss_backward(grad_loss_, router_logits, token_mask);
  const c10::cuda::CUDAGuard device_guard(router_logits.device());
  const at::ScalarType dtype = compute_dtype(router_logits.scalar_type());
  const at::Tensor logits = contiguous_in(router_logits, dtype);
  const at::Tensor grad_loss = contiguous_in(grad_loss_, dtype);
  const at::Tensor mask = contiguous_in(token_mask, at::kBool);
  const at::Tensor workspace = empty_workspace(kernels::loss_workspace(1, logits.size(1)), logits);
  const at::Tensor grad_logits = at::empty_like(logits);
  kernels::router_z_loss_backward(
      loss_args(logits, mask, workspace), grad_loss.const_data_ptr(), logits.const_data_ptr(),
      grad_logits.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return grad_logits.to(router_logits.scalar_type());
}

at::Tensor tokens_per_expert(const at::Tensor& topk_ids_, int64_t num_experts) {
  check_tokens_per_expert(topk_ids_, num_experts);
  const c10::cuda::CUDAGuard device_guard(topk_ids_.device());
  const at::Tensor topk_ids = topk_ids_.contiguous();
  const at::Tensor out = empty_tokens_per_expert(topk_ids, num_experts);
  kernels::count_experts(
      id_type_of(topk_ids), topk_ids.const_data_ptr(), topk_ids.numel(), num_experts,
      out.mutable_data_ptr<int64_t>(), c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, CUDA, m) {
  m.impl("_load_balancing_loss_forward", load_balancing_loss_forward);
  m.impl("_load_balancing_loss_backward", load_balancing_loss_backward);
  m.impl("router_z_loss", router_z_loss);
  m.impl("_router_z_loss_backward", router_z_loss_backward);
  m.impl("_tokens_per_expert", tokens_per_expert);
  m.impl("_router_entropy", router_entropy);
}

}  // namespace moe_ext::cuda
