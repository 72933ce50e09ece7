#include "ops/unpermute.h"

#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include "cuda/unpermute.h"

namespace moe_ext::cuda {
namespace {

at::Tensor unpermute(
    const at::Tensor& rows, const at::Tensor& row_map,
    const std::optional<at::Tensor>& topk_weights) {
  check_unpermute(rows, row_map, topk_weights);
  const c10::cuda::CUDAGuard device_guard(rows.device());
  return unpermute_rows(
      rows, row_map, contiguous_in(topk_weights, compute_dtype(rows.scalar_type())),
      row_map.size(0));
}

std::tuple<at::Tensor, at::Tensor> unpermute_backward(
    const at::Tensor& grad_out_, const at::Tensor& rows_, const at::Tensor& row_map_,
    const std::optional<at::Tensor>& topk_weights, std::array<bool, 2> output_mask) {
  check_unpermute_backward(grad_out_, rows_, row_map_, topk_weights);
  const c10::cuda::CUDAGuard device_guard(rows_.device());
  const at::Tensor grad_out = grad_out_.contiguous(), rows = rows_.contiguous();
  const at::Tensor row_map = row_map_.contiguous();
  const at::Tensor weights = contiguous_in(topk_weights, compute_dtype(rows.scalar_type()));
  at::Tensor grad_rows, grad_weights;
  if (output_mask[0]) grad_rows = at::zeros_like(rows);  // rows that no slot has stay so
  if (output_mask[1] && weights.defined()) grad_weights = at::zeros_like(weights);
  kernels::unpermute_backward(
      type_of(rows), grad_out.const_data_ptr(), rows.const_data_ptr(),
      row_map.const_data_ptr<int32_t>(), any_data_or_null(weights), row_map.size(0),
      row_map.size(1), rows.size(1), mutable_data_or_null(grad_rows),
      mutable_data_or_null(grad_weights), c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  if (grad_weights.defined()) grad_weights = grad_weights.to(topk_weights->scalar_type());
  return {grad_rows, grad_weights};
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, CUDA, m) {
  m.impl("unpermute", unpermute);
  m.impl("_unpermute_backward", unpermute_backward);
}

}  // namespace moe_ext::cuda
