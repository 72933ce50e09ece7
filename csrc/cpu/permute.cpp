#include "ops/permute.h"

#include <ATen/Parallel.h>

#include <cstring>

#include "cpu/combine.h"
#include "cpu/plan.h"
#include "cpu/register.h"

namespace moe_ext::cpu {
namespace {

// kernels

void gather_rows_kernel(
    const char* tokens, const int32_t* row_map, int64_t T, int64_t K, int64_t row_bytes,
    char* permuted) {
  at::parallel_for(0, T, 64, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t k = 0; k < K; ++k) {
        const int64_t row = row_map[t * K + k];
        if (row >= 0) {
          std::memcpy(permuted + row * row_bytes, tokens + t * row_bytes, row_bytes);
        }
      }
    }
  });
}

// operators

std::tuple<at::Tensor, at::Tensor, at::Tensor> permute(
    const at::Tensor& tokens_, const at::Tensor& topk_ids, int64_t num_experts) {
  check_permute(tokens_, topk_ids, num_experts);
  const at::Tensor tokens = tokens_.contiguous();
  const Plan plan = make_plan("permute", topk_ids, num_experts);
  const at::Tensor permuted = empty_permuted_tokens(tokens, topk_ids);
  gather_rows_kernel(
      static_cast<const char*>(tokens.const_data_ptr()), plan.row_map.const_data_ptr<int32_t>(),
      plan.row_map.size(0), plan.row_map.size(1), tokens.size(1) * tokens.element_size(),
      static_cast<char*>(permuted.mutable_data_ptr()));
  const int64_t num_used = plan.expert_offsets.const_data_ptr<int32_t>()[num_experts];
  permuted.narrow(0, num_used, permuted.size(0) - num_used).zero_();
  return {permuted, plan.row_map, plan.expert_offsets};
}

at::Tensor permute_backward(const at::Tensor& grad_permuted, const at::Tensor& row_map) {
  check_permute_backward(grad_permuted, row_map);
  check_row_map("_permute_backward", row_map, grad_permuted.size(0));
  const at::Tensor grad_tokens = empty_unpermuted(grad_permuted, row_map);
  combine(grad_permuted, row_map, {}, grad_tokens);
  return grad_tokens;
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, CPU, m) {
  impl<permute>(m, "permute");
  impl<permute_backward>(m, "_permute_backward");
}

}  // namespace moe_ext::cpu
