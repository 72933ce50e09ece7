// _apply_capacity: drops what goes to an expert beyond its capacity (definitions of the capacity:
// common/token_rounding.h).
//
//   topk_weights     [T, K]  float; ranks the slots for drop_policy "probs"
//   topk_ids         [T, K]  int64 or int32; skipped slots count as no choice, tokens without a
//                            choice as no token
//   capacity_factor  []      float64
//   kept_ids         [T, K]  int64: topk_ids, -1 where a slot was dropped or skipped
//
// "probs": an expert keeps its highest weights (NaN last), ties go to the earlier slot.
// "position": its earliest slots, all first choices before all second ones (GShard).
#pragma once

#include "ops/checks.h"

namespace moe_ext {

inline void check_capacity_factor(
    const char* op, const at::Tensor& capacity_factor, const c10::SymInt& min_capacity,
    const at::Tensor& like) {
  check_dtype(op, "capacity_factor", capacity_factor, at::kDouble);
  check_shape(op, "capacity_factor", capacity_factor, {});
  check_device(op, "capacity_factor", capacity_factor, like.device());
  TORCH_CHECK_VALUE(min_capacity >= 1, op, ": min_capacity must be >= 1, got ", min_capacity);
}

// Slots [T, K]: weights and ids of one shape.
inline void check_slots(
    const char* op, const at::Tensor& topk_weights, const at::Tensor& topk_ids) {
  check_ids_dtype(op, "topk_ids", topk_ids);
  check_shape(op, "topk_ids", topk_ids, {{"T"}, {"K"}});
  check_float(op, "topk_weights", topk_weights);
  check_shape(
      op, "topk_weights", topk_weights, {{"T", topk_ids.sym_size(0)}, {"K", topk_ids.sym_size(1)}});
  check_device(op, "topk_weights", topk_weights, topk_ids.device());
}

// Whether the policy is "probs".
inline bool check_apply_capacity(
    const at::Tensor& topk_weights, const at::Tensor& topk_ids, const at::Tensor& capacity_factor,
    const c10::SymInt& num_experts, const c10::SymInt& min_capacity, c10::string_view drop_policy) {
  constexpr const char* op = "_apply_capacity";
  check_slots(op, topk_weights, topk_ids);
  check_capacity_factor(op, capacity_factor, min_capacity, topk_ids);
  check_num_experts(op, "num_experts", num_experts);
  TORCH_CHECK_VALUE(
      drop_policy == "probs" || drop_policy == "position", op,
      ": drop_policy must be probs or position, got ", drop_policy);
  return drop_policy == "probs";
}

inline at::Tensor empty_kept_ids(const at::Tensor& topk_ids) {
  return empty_result(topk_ids.sym_sizes(), topk_ids.options().dtype(at::kLong));
}

}  // namespace moe_ext
