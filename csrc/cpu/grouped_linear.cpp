#include "ops/grouped_linear.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include "cpu/grouped_rows.h"

namespace moe_ext::cpu {
namespace {

// operators

at::Tensor grouped_linear(
    const at::Tensor& rows, const at::Tensor& expert_offsets, const at::Tensor& weight,
    const std::optional<at::Tensor>& bias) {
  check_grouped_linear(rows, expert_offsets, weight, bias);
  const auto offsets = read_offsets("_grouped_linear", expert_offsets, rows.size(0));
  const auto blocks = row_blocks(offsets);
  const at::ScalarType dtype = compute_dtype(rows.scalar_type());
  const at::Tensor out = empty_grouped_linear(rows, weight);
  parallel_each(blocks.size(), [&](int64_t i) {
    const RowBlock& block = blocks[i];
    at::Tensor y =
        at::mm(read_block(rows, {}, block, dtype), weight.select(0, block.expert).to(dtype).t());
    if (bias) y.add_(bias->select(0, block.expert));
    write_block(out, block, y);
  });
  zero_tail(out, offsets.back());
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> grouped_linear_backward(
    const at::Tensor& grad_out, const at::Tensor& rows, const at::Tensor& expert_offsets,
    const at::Tensor& weight, std::array<bool, 3> output_mask) {
  check_grouped_linear_backward(grad_out, rows, expert_offsets, weight);
  const auto offsets = read_offsets("_grouped_linear_backward", expert_offsets, rows.size(0));
  const at::ScalarType dtype = compute_dtype(rows.scalar_type());
  at::Tensor grad_rows, grad_weight, grad_bias;
  if (output_mask[0]) {
    grad_rows = at::empty(rows.sizes(), rows.options());
    const auto blocks = row_blocks(offsets);
    parallel_each(blocks.size(), [&](int64_t i) {
      const RowBlock& block = blocks[i];
      write_block(
          grad_rows, block,
          at::mm(read_block(grad_out, {}, block, dtype), weight.select(0, block.expert).to(dtype)));
    });
    zero_tail(grad_rows, offsets.back());
  }
  if (output_mask[1]) grad_weight = at::empty(weight.sizes(), weight.options());
  if (output_mask[2]) grad_bias = at::empty({weight.size(0), weight.size(1)}, weight.options());
  if (output_mask[1] || output_mask[2]) {
    parallel_each(weight.size(0), [&](int64_t e) {
      const RowBlock expert{e, offsets[e], offsets[e + 1]};
      const at::Tensor dy = read_block(grad_out, {}, expert, dtype);
      if (output_mask[1]) {
        grad_weight.select(0, e).copy_(at::mm(dy.t(), read_block(rows, {}, expert, dtype)));
      }
      if (output_mask[2]) grad_bias.select(0, e).copy_(dy.sum(0));
    });
  }
  return {grad_rows, grad_weight, grad_bias};
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, CPU, m) {
  m.impl("_grouped_linear", grouped_linear);
  m.impl("_grouped_linear_backward", grouped_linear_backward);
}

}  // namespace moe_ext::cpu
