// Where every slot (t, k), or pair, goes. Nothing is read back, so that values are not checked: ids
// and tokens outside their range count as skipped.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/where.h>

#include "cuda/operands.h"
#include "ops/permute.h"

namespace moe_ext::cuda {

// It carries its own inverse, for which nobody has to sort again.
struct Plan {
  at::Tensor row_map;         // [T, K] or [P] int32, -1 for a skipped slot
  at::Tensor expert_offsets;  // [E + 1] int32
  at::Tensor slot_of_row;     // [N] int32: of rows before expert_offsets[E]; what follows is no row
};

// The slots in `order` (or, undefined, as they come), grouped by expert.
inline Plan make_plan(
    const char* op, const char* argument, const at::Tensor& ids_, int64_t num_experts,
    const at::Tensor& order = {}) {
  check_count(op, argument, "slots", ids_.numel());
  const at::Tensor ids = ids_.contiguous();
  const int64_t N = ids.numel();
  const auto [row_map, expert_offsets] = empty_plan(ids, num_experts);
  const at::Tensor slot_of_row = at::empty({N}, row_map.options());
  const at::Tensor workspace = empty_workspace(kernels::plan_workspace(N, num_experts), ids);
  kernels::make_plan(
      id_type_of(ids), ids.const_data_ptr(), data_or_null<int32_t>(order), N, num_experts,
      row_map.mutable_data_ptr<int32_t>(), expert_offsets.mutable_data_ptr<int32_t>(),
      slot_of_row.mutable_data_ptr<int32_t>(), workspace.mutable_data_ptr(),
      c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {row_map, expert_offsets, slot_of_row};
}

// The plan whose row_map and expert_offsets a caller gives back.
inline Plan read_plan(const at::Tensor& row_map_, const at::Tensor& expert_offsets) {
  const at::Tensor row_map = row_map_.contiguous();
  const int64_t N = row_map.numel();
  const at::Tensor slot_of_row = at::full({N}, -1, row_map.options());
  kernels::invert_row_map(
      row_map.const_data_ptr<int32_t>(), N, slot_of_row.mutable_data_ptr<int32_t>(),
      c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {row_map, expert_offsets.contiguous(), slot_of_row};
}

// The pairs in `order` (or, undefined, as they come) by token: those of token t are order[i] for
// offsets[t] <= i < offsets[t + 1].
struct TokenOrder {
  at::Tensor offsets;  // [T + 1] int32
  at::Tensor order;    // [P] int32
};
inline TokenOrder order_by_token(
    const char* op, const at::Tensor& pair_tokens, int64_t T, const at::Tensor& order = {}) {
  const Plan plan = make_plan(op, "pair_tokens", pair_tokens, T, order);
  return {plan.expert_offsets, plan.slot_of_row};
}

// The plan of pairs [P] in any order.
inline Plan make_pair_plan(
    const char* op, const at::Tensor& pair_experts, const at::Tensor& pair_tokens, int64_t T,
    int64_t num_experts) {
  const at::Tensor is_used = pair_tokens.ge(0).logical_and(pair_tokens.lt(T));
  return make_plan(
      op, "pair_experts", at::where(is_used, pair_experts, at::full_like(pair_experts, -1)),
      num_experts, order_by_token(op, pair_tokens, T).order);
}

// The token of every row; says nothing of rows that no pair has, whose slot may be -1.
inline at::Tensor token_of_row(const at::Tensor& pair_tokens, const at::Tensor& slot_of_row) {
  return pair_tokens.index_select(0, slot_of_row.clamp_min(0)).to(at::kInt);
}

}  // namespace moe_ext::cuda
