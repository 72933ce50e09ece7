// The sum of each token's rows, gathered (never scattered), so that it needs no atomics and its
// order is fixed.
#pragma once

#include "cuda/plan.h"

namespace moe_ext::cuda {

// [T, H]: of token t the sum over its slots of weights[slot] * (rows[row] + the row's bias) with
// row = row_map[slot], in the slots' order, summed in the compute dtype; -1 is skipped.
//   rows [N, H]   weights: by slot, contiguous in the compute dtype, or undefined: 1
//   row_map [T, K], or [P] of pairs, whose order by token is given
inline at::Tensor unpermute_rows(
    const at::Tensor& rows_, const at::Tensor& row_map_, const at::Tensor& weights, int64_t T,
    const TokenOrder& by_token = {}, const kernels::RowBias& bias = {}) {
  const at::Tensor rows = rows_.contiguous(), row_map = row_map_.contiguous();
  const at::Tensor out = at::empty({T, rows.size(1)}, rows.options());
  kernels::unpermute(
      type_of(rows), rows.const_data_ptr(), row_map.const_data_ptr<int32_t>(),
      any_data_or_null(weights), T,
      {row_map.size(-1), data_or_null<int32_t>(by_token.offsets),
       data_or_null<int32_t>(by_token.order)},
      bias, rows.size(1), out.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

}  // namespace moe_ext::cuda
