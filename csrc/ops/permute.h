// permute: gather token rows so that the rows of each expert are contiguous.
//
//   tokens           [T, H]    float
//   topk_ids         [T, K]    int64 or int32; -1 or >= E marks a skipped slot
//   permuted_tokens  [N, H]    N = T K, tokens' dtype, expert-major, stable in (t, k); the rows at
//                              or past expert_offsets[E] are zeros
//   row_map          [T, K]    int32: permuted_tokens[row_map[t, k]] == tokens[t]; -1 if skipped
//   expert_offsets   [E + 1]   int32: expert e owns rows [offsets[e], offsets[e + 1])
//
// Ids below -1 are an IndexError on the CPU; on other devices they count as skipped, since
// nothing is read back.
#pragma once

#include <tuple>

#include "ops/checks.h"

namespace moe_ext {

inline void check_permute(
    const at::Tensor& tokens, const at::Tensor& topk_ids, const c10::SymInt& num_experts) {
  constexpr const char* op = "permute";
  check_float(op, "tokens", tokens);
  check_shape(op, "tokens", tokens, {{"T"}, {"H"}});
  check_ids_dtype(op, "topk_ids", topk_ids);
  check_shape(op, "topk_ids", topk_ids, {{"T", tokens.sym_size(0)}, {"K"}});
  check_device(op, "topk_ids", topk_ids, tokens.device());
  check_num_experts(op, "num_experts", num_experts);
}

// row_map and expert_offsets: where every slot goes.
inline std::tuple<at::Tensor, at::Tensor> empty_plan(
    const at::Tensor& topk_ids, const c10::SymInt& num_experts) {
  const auto options = topk_ids.options().dtype(at::kInt);
  return {empty_result(topk_ids.sym_sizes(), options), empty_result({num_experts + 1}, options)};
}

inline at::Tensor empty_permuted_tokens(const at::Tensor& tokens, const at::Tensor& topk_ids) {
  return empty_result(
      {topk_ids.sym_size(0) * topk_ids.sym_size(1), tokens.sym_size(1)}, tokens.options());
}

inline void check_permute_backward(const at::Tensor& grad_permuted, const at::Tensor& row_map) {
  constexpr const char* op = "_permute_backward";
  check_float(op, "grad_permuted", grad_permuted);
  check_dtype(op, "row_map", row_map, at::kInt);
  check_shape(op, "row_map", row_map, {{"T"}, {"K"}});
  check_shape(
      op, "grad_permuted", grad_permuted,
      {{"N", row_map.sym_size(0) * row_map.sym_size(1)}, {"H"}});
  check_device(op, "row_map", row_map, grad_permuted.device());
}

inline at::Tensor empty_unpermuted(const at::Tensor& rows, const at::Tensor& row_map) {
  return empty_result({row_map.sym_size(0), rows.sym_size(1)}, rows.options());
}

}  // namespace moe_ext
