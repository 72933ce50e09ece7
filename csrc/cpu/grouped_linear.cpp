#include "ops/grouped_linear.h"

#include "cpu/grouped_gemm.h"
#include "cpu/operands.h"
#include "cpu/plan.h"
#include "cpu/register.h"

namespace moe_ext::cpu {
namespace {

// operators

at::Tensor grouped_linear(
    const at::Tensor& rows, const at::Tensor& expert_offsets, const at::Tensor& weight_,
    const std::optional<at::Tensor>& bias) {
  check_grouped_linear(rows, expert_offsets, weight_, bias);
  const at::Tensor weight = with_dense_weights(weight_);
  const at::Tensor out = empty_grouped_linear(rows, weight);
  grouped_product(
      with_dense_rows(rows), read_offsets("_grouped_linear", expert_offsets, rows.size(0)),
      weights_of(weight), bias ? bias->contiguous() : at::Tensor(), out);
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> grouped_linear_backward(
    const at::Tensor& grad_out_, const at::Tensor& rows_, const at::Tensor& expert_offsets,
    const at::Tensor& weight_, std::array<bool, 3> output_mask) {
  check_grouped_linear_backward(grad_out_, rows_, expert_offsets, weight_);
  const at::Tensor grad_out = with_dense_rows(grad_out_);
  const at::Tensor rows = with_dense_rows(rows_);
  const at::Tensor weight = with_dense_weights(weight_);
  const auto offsets = read_offsets("_grouped_linear_backward", expert_offsets, rows.size(0));
  at::Tensor grad_rows, grad_weight, grad_bias;
  if (output_mask[0]) {
    grad_rows = empty_like_contiguous(rows);
    grouped_product(grad_out, offsets, transposed(weights_of(weight)), {}, grad_rows);
  }
  const auto& kernels = kernels_for(rows.scalar_type());
  const auto experts = whole_experts(offsets);
  Phase phase;
  kernels::GradWeightsArgs product;
  if (output_mask[1]) {
    grad_weight = empty_grad_of_weight(weight_);
    product = grad_weights_args(
        rows_of(grad_out), rows_of(rows), grad_weight,
        streams(weight.numel() * weight.element_size()));
    phase.push_back(grad_weights_job(kernels, product, experts));
  }
  if (output_mask[2]) grad_bias = empty_result({weight.size(0), weight.size(1)}, weight.options());
  const kernels::ColumnSumArgs sum{
      weight.size(1), rows_of(grad_out), nullptr, mutable_data_or_null(grad_bias)};
  if (output_mask[2]) phase.push_back(column_sum_job(kernels, sum, experts));
  run_phases(
      {phase}, kernels.grad_scratch_bytes(largest_block(experts)),
      estimate_nanoseconds(
          offsets.back() * weight.size(1) * weight.size(2),
          weight.numel() * weight.element_size()));
  return {grad_rows, grad_weight, grad_bias};
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, CPU, m) {
  impl<grouped_linear>(m, "_grouped_linear");
  impl<grouped_linear_backward>(m, "_grouped_linear_backward");
}

}  // namespace moe_ext::cpu
