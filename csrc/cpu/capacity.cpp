#include "ops/capacity.h"

#include <ATen/Parallel.h>

#include "common/token_rounding.h"
#include "cpu/kernels/capacity.h"
#include "cpu/plan.h"
#include "cpu/register.h"

namespace moe_ext::cpu {
namespace {

// operators

at::Tensor apply_capacity(
    const at::Tensor& topk_weights, const at::Tensor& topk_ids, const at::Tensor& capacity_factor,
    int64_t num_experts, int64_t min_capacity, c10::string_view drop_policy) {
  const bool by_weight = check_apply_capacity(
      topk_weights, topk_ids, capacity_factor, num_experts, min_capacity, drop_policy);
  const at::Tensor ids_tensor = read_ids("_apply_capacity", topk_ids);
  const int64_t* ids = ids_tensor.const_data_ptr<int64_t>();
  const int64_t T = topk_ids.size(0), K = topk_ids.size(1), E = num_experts;
  const kernels::SlotsByExpert slots(ids, T * K, E);
  const int64_t capacity = capacity_of(
      *capacity_factor.const_data_ptr<double>(), slots.offsets[E],
      kernels::count_routed_tokens(ids, T, K, E), E, min_capacity);
  const at::Tensor kept_ids = empty_kept_ids(topk_ids).fill_(-1);
  int64_t* kept = kept_ids.mutable_data_ptr<int64_t>();
  if (by_weight) {
    const at::Tensor weights =
        contiguous_in(topk_weights, compute_dtype(topk_weights.scalar_type()));
    MOE_DISPATCH_COMPUTE(weights.scalar_type(), "apply_capacity", [&] {
      const scalar_t* w = weights.const_data_ptr<scalar_t>();
      at::parallel_for(0, E, 1, [&](int64_t begin, int64_t end) {
        kernels::keep_highest_weights(w, slots, capacity, begin, end, kept);
      });
    });
  } else {
    kernels::keep_earliest(ids, T, K, E, capacity, kept);
  }
  return kept_ids;
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, CPU, m) { impl<apply_capacity>(m, "_apply_capacity"); }

}  // namespace moe_ext::cpu
