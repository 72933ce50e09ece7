// The weighted sum over k of each token's rows, gathered (never scattered), so that it needs no
// atomics and its order is fixed.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <vector>

#include "ops/dtypes.h"

namespace moe_ext::cpu {

// out[t] = sum_k weights[t, k] * rows[row_map[t, k]], summed in compute_t with k ascending.
//   rows [N, H]   row_map [T, K], -1 is skipped   weights [T, K] or null (all 1)   out [T, H]
template <class scalar_t, class compute_t>
void combine_kernel(
    const scalar_t* rows, const int32_t* row_map, const compute_t* weights, int64_t T, int64_t K,
    int64_t H, scalar_t* out) {
  at::parallel_for(0, T, 16, [&](int64_t begin, int64_t end) {
    std::vector<compute_t> sum(H);
    for (int64_t t = begin; t < end; ++t) {
      std::fill(sum.begin(), sum.end(), compute_t(0));
      for (int64_t k = 0; k < K; ++k) {
        const int64_t row = row_map[t * K + k];
        if (row < 0) continue;
        const compute_t w = weights ? weights[t * K + k] : compute_t(1);
        const scalar_t* source = rows + row * H;
        for (int64_t i = 0; i < H; ++i) sum[i] += w * static_cast<compute_t>(source[i]);
      }
      for (int64_t i = 0; i < H; ++i) out[t * H + i] = static_cast<scalar_t>(sum[i]);
    }
  });
}

// weights: contiguous, in the compute dtype, or undefined.
inline void combine(
    const at::Tensor& rows_, const at::Tensor& row_map_, const at::Tensor& weights,
    const at::Tensor& out) {
  const at::Tensor rows = rows_.contiguous();
  const at::Tensor row_map = row_map_.contiguous();
  MOE_DISPATCH_FLOAT(out.scalar_type(), "combine", [&] {
    using compute_t = at::opmath_type<scalar_t>;
    combine_kernel<scalar_t, compute_t>(
        rows.const_data_ptr<scalar_t>(), row_map.const_data_ptr<int32_t>(),
        data_or_null<compute_t>(weights), row_map.size(0), row_map.size(1), rows.size(1),
        out.mutable_data_ptr<scalar_t>());
  });
}

}  // namespace moe_ext::cpu
