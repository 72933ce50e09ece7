#include "ops/unpermute.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include "cpu/combine.h"
#include "cpu/plan.h"

namespace moe_ext::cpu {
namespace {

// kernels

// grad_rows[r] = w grad_out[t] and grad_weights[t, k] = <grad_out[t], rows[r]> for r of slot
// (t, k); either output may be null. Rows of no slot get zeros.
template <class scalar_t, class compute_t>
void unpermute_backward_kernel(
    const scalar_t* grad_out, const scalar_t* rows, const int32_t* slot_of_row,
    const compute_t* weights, int64_t N, int64_t K, int64_t H, scalar_t* grad_rows,
    compute_t* grad_weights) {
  at::parallel_for(0, N, 16, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t slot = slot_of_row[r];
      if (slot < 0) {
        if (grad_rows) std::fill_n(grad_rows + r * H, H, scalar_t(0));
        continue;
      }
      const scalar_t* g = grad_out + slot / K * H;
      if (grad_rows) {
        const compute_t w = weights ? weights[slot] : compute_t(1);
        for (int64_t i = 0; i < H; ++i) {
          grad_rows[r * H + i] = static_cast<scalar_t>(w * static_cast<compute_t>(g[i]));
        }
      }
      if (grad_weights) {
        compute_t dot = 0;
        for (int64_t i = 0; i < H; ++i) {
          dot += static_cast<compute_t>(g[i]) * static_cast<compute_t>(rows[r * H + i]);
        }
        grad_weights[slot] = dot;
      }
    }
  });
}

// operators

at::Tensor unpermute(
    const at::Tensor& rows, const at::Tensor& row_map,
    const std::optional<at::Tensor>& topk_weights) {
  check_unpermute(rows, row_map, topk_weights);
  invert_row_map("unpermute", row_map, rows.size(0));  // for its checks
  const at::Tensor out = empty_unpermuted(rows, row_map);
  combine(rows, row_map, contiguous_in(topk_weights, compute_dtype(rows.scalar_type())), out);
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
  if (output_mask[0]) grad_rows = at::empty_like(rows);
  if (output_mask[1] && weights.defined()) grad_weights = at::zeros_like(weights);
  MOE_DISPATCH_FLOAT(rows.scalar_type(), "unpermute_backward", [&] {
    using compute_t = at::opmath_type<scalar_t>;
    unpermute_backward_kernel<scalar_t, compute_t>(
        grad_out.const_data_ptr<scalar_t>(), rows.const_data_ptr<scalar_t>(), slot_of_row.data(),
        data_or_null<compute_t>(weights), rows.size(0), row_map.size(1), rows.size(1),
        grad_rows.defined() ? grad_rows.mutable_data_ptr<scalar_t>() : nullptr,
        grad_weights.defined() ? grad_weights.mutable_data_ptr<compute_t>() : nullptr);
  });
  if (grad_weights.defined()) grad_weights = grad_weights.to(topk_weights->scalar_type());
  return {grad_rows, grad_weights};
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, CPU, m) {
  m.impl("unpermute", unpermute);
  m.impl("_unpermute_backward", unpermute_backward);
}

}  // namespace moe_ext::cpu
