#include "ops/permute.h"

#include <ATen/Parallel.h>

#include "cpu/plan.h"
#include "cpu/register.h"
#include "cpu/unpermute.h"

namespace moe_ext::cpu {
namespace {

// operators

std::tuple<at::Tensor, at::Tensor, at::Tensor> permute(
    const at::Tensor& tokens_, const at::Tensor& topk_ids, int64_t num_experts) {
  check_permute(tokens_, topk_ids, num_experts);
  const at::Tensor tokens = tokens_.contiguous();
  const Plan plan = make_plan("permute", topk_ids, num_experts, /*with_inverse=*/false);
  const at::Tensor permuted = empty_permuted_tokens(tokens, topk_ids);
  const char* from = static_cast<const char*>(tokens.const_data_ptr());
  char* to = static_cast<char*>(permuted.mutable_data_ptr());
  const int32_t* row_map = plan.row_map.const_data_ptr<int32_t>();
  const int64_t K = topk_ids.size(1), row_bytes = tokens.size(1) * tokens.element_size();
  at::parallel_for(0, tokens.size(0), 64, [&](int64_t begin, int64_t end) {
    kernels::gather_rows(from, row_map, K, row_bytes, begin, end, to);
  });
  const int64_t num_used = plan.expert_offsets.const_data_ptr<int32_t>()[num_experts];
  permuted.narrow(0, num_used, permuted.size(0) - num_used).zero_();
  return {permuted, plan.row_map, plan.expert_offsets};
}

at::Tensor permute_backward(const at::Tensor& grad_permuted, const at::Tensor& row_map) {
  check_permute_backward(grad_permuted, row_map);
  check_row_map("_permute_backward", row_map, grad_permuted.size(0));
  const at::Tensor grad_tokens = empty_unpermuted(grad_permuted, row_map);
  unpermute_rows(grad_permuted, row_map, {}, grad_tokens);
  return grad_tokens;
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, CPU, m) {
  impl<permute>(m, "permute");
  impl<permute_backward>(m, "_permute_backward");
}

}  // namespace moe_ext::cpu
