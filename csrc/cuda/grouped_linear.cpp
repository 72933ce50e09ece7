#include "ops/grouped_linear.h"

#include <torch/library.h>

#include "cuda/grouped_gemm.h"
#include "cuda/operands.h"

namespace moe_ext::cuda {
namespace {

at::Tensor grouped_linear(
    const at::Tensor& rows, const at::Tensor& expert_offsets, const at::Tensor& weight,
    const std::optional<at::Tensor>& bias) {
  check_grouped_linear(rows, expert_offsets, weight, bias);
  const c10::cuda::CUDAGuard device_guard(rows.device());
  const at::Tensor offsets = expert_offsets.contiguous();
  const at::Tensor out = grouped_product(rows, offsets, weight);
  weigh_rows(out, offsets, contiguous_in(bias, rows.scalar_type()), {});
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> grouped_linear_backward(
    const at::Tensor& grad_out_, const at::Tensor& rows, const at::Tensor& expert_offsets,
    const at::Tensor& weight, std::array<bool, 3> output_mask) {
  check_grouped_linear_backward(grad_out_, rows, expert_offsets, weight);
  const c10::cuda::CUDAGuard device_guard(rows.device());
  const at::Tensor grad_out = grad_out_.contiguous(), offsets = expert_offsets.contiguous();
  at::Tensor grad_rows, grad_weight, grad_bias;
  if (output_mask[0]) {
    grad_rows = grouped_product(grad_out, offsets, weight.transpose(1, 2));
    weigh_rows(grad_rows, offsets, {}, {});
  }
  if (output_mask[1]) {
    grad_weight = grouped_grad_of_weight(grad_out, rows, offsets, weight);
  }
  if (output_mask[2]) grad_bias = grouped_sum(grad_out, offsets, {}, {});
  return {grad_rows, grad_weight, grad_bias};
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, CUDA, m) {
  m.impl("_grouped_linear", grouped_linear);
  m.impl("_grouped_linear_backward", grouped_linear_backward);
}

}  // namespace moe_ext::cuda
