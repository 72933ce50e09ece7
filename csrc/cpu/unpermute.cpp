#include "ops/unpermute.h"

#include <ATen/Parallel.h>
#include <ATen/ops/zeros_like.h>

#include "cpu/plan.h"
#include "cpu/register.h"
#include "cpu/unpermute.h"

namespace moe_ext::cpu {
namespace {

// operators

at::Tensor unpermute(
    const at::Tensor& rows, const at::Tensor& row_map,
    const std::optional<at::Tensor>& topk_weights) {
  check_unpermute(rows, row_map, topk_weights);
  check_row_map("unpermute", row_map, rows.size(0));
  const at::Tensor out = empty_unpermuted(rows, row_map);
  const at::Tensor weights = contiguous_in(topk_weights, compute_dtype(rows.scalar_type()));
  unpermute_rows(rows, row_map, weights, out);
  return out;
}

std::tuple<at::Tensor, at::Tensor> unpermute_backward(
    const at::Tensor& grad_out_, const at::Tensor& rows_, const at::Tensor& row_map,
    const std::optional<at::Tensor>& topk_weights, std::array<bool, 2> output_mask) {
  check_unpermute_backward(grad_out_, rows_, row_map, topk_weights);
  const at::Tensor grad_out = grad_out_.contiguous();
  const at::Tensor rows = rows_.contiguous();
  const at::Tensor weights = contiguous_in(topk_weights, compute_dtype(rows.scalar_type()));
  const std::vector<int32_t> slot_of_row =
      invert_row_map("_unpermute_backward", row_map, rows.size(0));
  at::Tensor grad_rows, grad_weights;
  if (output_mask[0]) grad_rows = empty_like_contiguous(rows);
  if (output_mask[1] && weights.defined()) grad_weights = at::zeros_like(weights);
  const auto& kernels = kernels_for(rows.scalar_type());
  const kernels::UnpermuteGradArgs args{
      row_map.size(1),
      rows.size(1),
      grad_out.const_data_ptr(),
      rows.const_data_ptr(),
      slot_of_row.data(),
      any_data_or_null(weights),
      mutable_data_or_null(grad_rows),
      mutable_data_or_null(grad_weights)};
  at::parallel_for(0, rows.size(0), 16, [&](int64_t begin, int64_t end) {
    kernels.unpermute_backward(args, begin, end);
  });
  if (grad_weights.defined()) grad_weights = grad_weights.to(topk_weights->scalar_type());
  return {grad_rows, grad_weights};
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, CPU, m) {
  impl<unpermute>(m, "unpermute");
  impl<unpermute_backward>(m, "_unpermute_backward");
}

}  // namespace moe_ext::cpu
