#include "ops/permute.h"

#include <torch/library.h>

#include "cuda/plan.h"

namespace moe_ext::cuda {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> permute(
    const at::Tensor& tokens_, const at::Tensor& topk_ids, int64_t num_experts) {
  check_permute(tokens_, topk_ids, num_experts);
  const c10::cuda::CUDAGuard device_guard(tokens_.device());
  const at::Tensor tokens = tokens_.contiguous();
  const Plan plan = make_plan("permute", topk_ids, num_experts);
  const at::Tensor permuted = empty_permuted_tokens(tokens, topk_ids);
  gather_rows(
      type_of(tokens), tokens.const_data_ptr(), plan.slot_of_row.const_data_ptr<int32_t>(),
      plan.expert_offsets.const_data_ptr<int32_t>() + num_experts, permuted.size(0),
      topk_ids.size(1), tokens.size(1), permuted.mutable_data_ptr(),
      c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {permuted, plan.row_map, plan.expert_offsets};
}

at::Tensor permute_backward(const at::Tensor& grad_permuted_, const at::Tensor& row_map_) {
  check_permute_backward(grad_permuted_, row_map_);
  const c10::cuda::CUDAGuard device_guard(grad_permuted_.device());
  const at::Tensor grad_permuted = grad_permuted_.contiguous(), row_map = row_map_.contiguous();
  const at::Tensor grad_tokens = empty_unpermuted(grad_permuted, row_map);
  unpermute(
      type_of(grad_permuted), grad_permuted.const_data_ptr(), row_map.const_data_ptr<int32_t>(),
      nullptr, row_map.size(0), row_map.size(1), grad_permuted.size(1),
      grad_tokens.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return grad_tokens;
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, CUDA, m) {
  m.impl("permute", permute);
  m.impl("_permute_backward", permute_backward);
}

}  // namespace moe_ext::cuda
