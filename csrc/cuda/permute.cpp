#include "ops/permute.h"

#include <torch/library.h>

#include "cuda/unpermute.h"

namespace moe_ext::cuda {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> permute(
    const at::Tensor& tokens_, const at::Tensor& topk_ids, int64_t num_experts) {
  check_permute(tokens_, topk_ids, num_experts);
  const c10::cuda::CUDAGuard device_guard(tokens_.device());
  const at::Tensor tokens = tokens_.contiguous();
  const Plan plan = make_plan("permute", "topk_ids", topk_ids, num_experts);
  const at::Tensor permuted = empty_permuted_tokens(tokens, topk_ids);
  kernels::gather_rows(
      type_of(tokens), tokens.const_data_ptr(), plan.slot_of_row.const_data_ptr<int32_t>(),
      plan.expert_offsets.const_data_ptr<int32_t>() + num_experts, permuted.size(0),
      topk_ids.size(1), tokens.size(1), permuted.mutable_data_ptr(),
      c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {permuted, plan.row_map, plan.expert_offsets};
}

at::Tensor permute_backward(const at::Tensor& grad_permuted, const at::Tensor& row_map) {
  check_permute_backward(grad_permuted, row_map);
  const c10::cuda::CUDAGuard device_guard(grad_permuted.device());
  return unpermute_rows(grad_permuted, row_map, {}, row_map.size(0));
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, CUDA, m) {
  m.impl("permute", permute);
  m.impl("_permute_backward", permute_backward);
}

}  // namespace moe_ext::cuda
