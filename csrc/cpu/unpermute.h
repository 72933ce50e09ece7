// The weighted sum over k of each token's rows, gathered (never scattered), so that it needs no
// atomics and its order is fixed.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include "cpu/operands.h"

namespace moe_ext::cpu {

// out[t] = sum_k weights[t, k] * rows[row_map[t, k]], k ascending, summed in the compute dtype.
//   rows [N, H]   row_map [T, K], -1 is skipped   out [T, H]
//   weights [T, K]: contiguous, in the compute dtype, or undefined: 1
inline void unpermute_rows(
    const at::Tensor& rows_, const at::Tensor& row_map_, const at::Tensor& weights,
    const at::Tensor& out) {
  const at::Tensor rows = rows_.contiguous();
  const at::Tensor row_map = row_map_.contiguous();
  const auto& kernels = kernels_for(rows.scalar_type());
  const kernels::UnpermuteArgs args{row_map.size(1),           rows.size(1),
                                    rows.const_data_ptr(),     row_map.const_data_ptr<int32_t>(),
                                    any_data_or_null(weights), out.mutable_data_ptr()};
  at::parallel_for(0, row_map.size(0), 16, [&](int64_t begin, int64_t end) {
    kernels.unpermute(args, begin, end);
  });
}

}  // namespace moe_ext::cpu
