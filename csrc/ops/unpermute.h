// unpermute: the weighted sum over k of each token's rows; the inverse of permute.
//
//   rows          [N, H]  float
//   row_map       [T, K]  int32 as from permute: -1 is skipped, no row occurs twice
//   topk_weights  [T, K]  float or none (weights 1)
//   out           [T, H]  rows' dtype; summed in fp32 (fp64), k ascending, rounded once
//
// A row_map entry below -1 or at or past N, or one that occurs twice, is an IndexError on the CPU
// and undefined elsewhere.
#pragma once

#include "ops/checks.h"
#include "ops/permute.h"

namespace moe_ext {

inline void check_unpermute(
    const at::Tensor& rows, const at::Tensor& row_map,
    const std::optional<at::Tensor>& topk_weights) {
  constexpr const char* op = "unpermute";
  check_float(op, "rows", rows);
  check_shape(op, "rows", rows, {{"N"}, {"H"}});
  check_dtype(op, "row_map", row_map, at::kInt);
  check_shape(op, "row_map", row_map, {{"T"}, {"K"}});
  check_device(op, "row_map", row_map, rows.device());
  if (!topk_weights) return;
  check_float(op, "topk_weights", *topk_weights);
  check_shape(
      op, "topk_weights", *topk_weights, {{"T", row_map.sym_size(0)}, {"K", row_map.sym_size(1)}});
  check_device(op, "topk_weights", *topk_weights, rows.device());
}

inline void check_unpermute_backward(
    const at::Tensor& grad_out, const at::Tensor& rows, const at::Tensor& row_map,
    const std::optional<at::Tensor>& topk_weights) {
  check_unpermute(rows, row_map, topk_weights);
  check_operand(
      "_unpermute_backward", "grad_out", grad_out, "rows", rows,
      {{"T", row_map.sym_size(0)}, {"H", rows.sym_size(1)}});
}

}  // namespace moe_ext
