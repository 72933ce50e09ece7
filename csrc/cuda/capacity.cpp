#include "ops/capacity.h"

#include <torch/library.h>

#include "cuda/operands.h"

namespace moe_ext::cuda {
namespace {

at::Tensor apply_capacity(
    const at::Tensor& topk_weights, const at::Tensor& topk_ids, const at::Tensor& capacity_factor,
    int64_t num_experts, int64_t min_capacity, c10::string_view drop_policy) {
  const bool by_weight = check_apply_capacity(
      topk_weights, topk_ids, capacity_factor, num_experts, min_capacity, drop_policy);
  check_count("_apply_capacity", "topk_ids", "slots", topk_ids.numel());
  const c10::cuda::CUDAGuard device_guard(topk_ids.device());
  const at::Tensor ids = contiguous_in(topk_ids, at::kLong);
  const at::Tensor weights = contiguous_in(topk_weights, compute_dtype(topk_weights.scalar_type()));
  const kernels::CapacityArgs args{
      ids.size(0),
      ids.size(1),
      num_experts,
      ids.const_data_ptr<int64_t>(),
      capacity_factor.const_data_ptr<double>(),
      min_capacity};
  const at::Tensor workspace =
      empty_workspace(kernels::capacity_workspace(type_of(weights), args), ids);
  const at::Tensor kept_ids = empty_kept_ids(topk_ids);
  kernels::apply_capacity(
      type_of(weights), args, by_weight ? weights.const_data_ptr() : nullptr,
      kept_ids.mutable_data_ptr<int64_t>(), workspace.mutable_data_ptr(),
      c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return kept_ids;
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, CUDA, m) { m.impl("_apply_capacity", apply_capacity); }

}  // namespace moe_ext::cuda
