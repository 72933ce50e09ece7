// Where every slot (t, k) goes.
#pragma once

#include <limits>

#include "cuda/operands.h"
#include "ops/permute.h"

namespace moe_ext::cuda {

struct Plan {
  at::Tensor row_map;         // [T, K] int32, -1 for a skipped slot
  at::Tensor expert_offsets;  // [E + 1] int32
  at::Tensor slot_of_row;     // [N] int32, the skipped slots at its end
};

// The plan of topk_ids [T, K]. Ids below -1 are skipped: nothing is read back to check them.
inline Plan make_plan(const char* op, const at::Tensor& topk_ids_, int64_t num_experts) {
  const at::Tensor topk_ids = topk_ids_.contiguous();
  const int64_t N = topk_ids.numel();
  TORCH_CHECK(
      N <= std::numeric_limits<int32_t>::max(), op, ": topk_ids must have fewer than 2^31 slots, ",
      "got ", N);
  const auto [row_map, expert_offsets] = empty_plan(topk_ids, num_experts);
  const at::Tensor slot_of_row = at::empty({N}, row_map.options());
  const at::Tensor workspace = empty_workspace(plan_workspace(N, num_experts), topk_ids);
  make_plan(
      id_type_of(topk_ids), topk_ids.const_data_ptr(), N, num_experts,
      row_map.mutable_data_ptr<int32_t>(), expert_offsets.mutable_data_ptr<int32_t>(),
      slot_of_row.mutable_data_ptr<int32_t>(), workspace.mutable_data_ptr(),
      c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {row_map, expert_offsets, slot_of_row};
}

}  // namespace moe_ext::cuda
