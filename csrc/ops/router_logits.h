// _router_logits: tokens weight^T, summed in fp32 (fp64 if either is fp64) from the tokens as they
// are; tokens and weight may differ in dtype.
//
//   tokens  [T, H]  float
//   weight  [E, H]  float
//   logits  [T, E]  fp32 or fp64
#pragma once

#include <array>
#include <tuple>

#include "ops/checks.h"

namespace moe_ext {

inline at::ScalarType router_logits_dtype(const at::Tensor& tokens, const at::Tensor& weight) {
  const bool wide = tokens.scalar_type() == at::kDouble || weight.scalar_type() == at::kDouble;
  return wide ? at::kDouble : at::kFloat;
}

inline void check_router_logits(const at::Tensor& tokens, const at::Tensor& weight) {
  constexpr const char* op = "_router_logits";
  check_float(op, "tokens", tokens);
  check_shape(op, "tokens", tokens, {{"T"}, {"H"}});
  check_float(op, "weight", weight);
  check_shape(op, "weight", weight, {{"E"}, {"H", tokens.sym_size(1)}});
  check_num_experts(op, "weight's E", weight.sym_size(0));
  check_positive(op, "weight", "H", weight.sym_size(1));
  check_device(op, "weight", weight, tokens.device());
}

inline at::Tensor empty_router_logits(const at::Tensor& tokens, const at::Tensor& weight) {
  return empty_result(
      {tokens.sym_size(0), weight.sym_size(0)},
      tokens.options().dtype(router_logits_dtype(tokens, weight)));
}

inline void check_router_logits_backward(
    const at::Tensor& grad_logits, const at::Tensor& tokens, const at::Tensor& weight) {
  check_router_logits(tokens, weight);
  constexpr const char* op = "_router_logits_backward";
  check_float(op, "grad_logits", grad_logits);
  check_shape(
      op, "grad_logits", grad_logits, {{"T", tokens.sym_size(0)}, {"E", weight.sym_size(0)}});
  check_device(op, "grad_logits", grad_logits, tokens.device());
}

}  // namespace moe_ext
