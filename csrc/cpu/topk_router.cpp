#include "ops/topk_router.h"

#include <ATen/Parallel.h>

#include <vector>

#include "cpu/operands.h"
#include "cpu/plan.h"
#include "cpu/register.h"

namespace moe_ext::cpu {
namespace {

// Tens of microseconds of work, and enough tasks for many threads.
constexpr int64_t kTokensPerTask = 64;

// logits: contiguous, in the compute dtype.
kernels::RouterArgs router_args(
    const at::Tensor& logits, int64_t K, ScoreFunction score_function, bool renormalize,
    double scaling_factor) {
  return {logits.size(1), K, score_function, renormalize, scaling_factor, logits.const_data_ptr()};
}

// fn(begin, end, scratch) over all tokens.
template <class Fn>
void for_tokens(
    const kernels::RouterKernels& kernels, const kernels::RouterArgs& args, int64_t T,
    const Fn& fn) {
  at::parallel_for(0, T, kTokensPerTask, [&](int64_t begin, int64_t end) {
    std::vector<char> scratch(kernels.scratch_bytes(args.E, args.K));
    fn(begin, end, scratch.data());
  });
}

// operators

std::tuple<at::Tensor, at::Tensor, at::Tensor> topk_router(
    const at::Tensor& router_logits, int64_t top_k, c10::string_view score_function,
    bool renormalize, double scaling_factor, const std::optional<at::Tensor>& expert_bias,
    int64_t num_groups, int64_t topk_groups) {
  const TopkRouterOptions options = check_topk_router(
      router_logits, top_k, score_function, renormalize, scaling_factor, expert_bias, num_groups,
      topk_groups);
  const at::ScalarType dtype = compute_dtype(router_logits.scalar_type());
  const at::Tensor logits = contiguous_in(router_logits, dtype);
  const at::Tensor bias = contiguous_in(expert_bias, dtype);
  const auto outputs = empty_topk_router_outputs(router_logits, top_k);
  const auto& [weights, ids, probs] = outputs;
  const auto& kernels = router_kernels_for(dtype);
  const auto args = router_args(logits, top_k, options.score_function, renormalize, scaling_factor);
  const kernels::ChoiceArgs choice{any_data_or_null(bias), num_groups, topk_groups};
  int64_t* chosen = ids.mutable_data_ptr<int64_t>();
  void* weights_data = weights.mutable_data_ptr();
  void* probs_data = probs.mutable_data_ptr();
  for_tokens(kernels, args, logits.size(0), [&](int64_t begin, int64_t end, void* scratch) {
    kernels.choose(args, choice, begin, end, chosen, scratch);
    kernels.weights(args, chosen, begin, end, weights_data, probs_data);
  });
  return outputs;
}

std::tuple<at::Tensor, at::Tensor> router_weights(
    const at::Tensor& router_logits, const at::Tensor& topk_ids, c10::string_view score_function,
    bool renormalize, double scaling_factor) {
  const ScoreFunction parsed = check_router_weights(router_logits, topk_ids, score_function);
  const at::ScalarType dtype = compute_dtype(router_logits.scalar_type());
  const at::Tensor logits = contiguous_in(router_logits, dtype);
  const at::Tensor ids = read_ids("_router_weights", topk_ids);
  const auto outputs = empty_router_weights_outputs(router_logits, topk_ids);
  const auto& kernels = router_kernels_for(dtype);
  const auto args = router_args(logits, ids.size(1), parsed, renormalize, scaling_factor);
  const int64_t* chosen = ids.const_data_ptr<int64_t>();
  void* weights = std::get<0>(outputs).mutable_data_ptr();
  void* probs = std::get<1>(outputs).mutable_data_ptr();
  for_tokens(kernels, args, logits.size(0), [&](int64_t begin, int64_t end, void*) {
    kernels.weights(args, chosen, begin, end, weights, probs);
  });
  return outputs;
}

at::Tensor router_weights_backward(
    const std::optional<at::Tensor>& grad_weights_, const std::optional<at::Tensor>& grad_probs_,
    const at::Tensor& router_logits, const at::Tensor& topk_ids, c10::string_view score_function,
    bool renormalize, double scaling_factor) {
  const ScoreFunction parsed = check_router_weights_backward(
      grad_weights_, grad_probs_, router_logits, topk_ids, score_function);
  const at::ScalarType dtype = compute_dtype(router_logits.scalar_type());
  const at::Tensor logits = contiguous_in(router_logits, dtype);
  const at::Tensor ids = read_ids("_router_weights_backward", topk_ids);
  const at::Tensor grad_weights = contiguous_in(grad_weights_, dtype);
  const at::Tensor grad_probs = contiguous_in(grad_probs_, dtype);
  const at::Tensor grad_logits = empty_like_contiguous(logits);
  const auto& kernels = router_kernels_for(dtype);
  const auto args = router_args(logits, ids.size(1), parsed, renormalize, scaling_factor);
  const int64_t* chosen = ids.const_data_ptr<int64_t>();
  const void* grad_weights_data = any_data_or_null(grad_weights);
  const void* grad_probs_data = any_data_or_null(grad_probs);
  void* out = grad_logits.mutable_data_ptr();
  for_tokens(kernels, args, logits.size(0), [&](int64_t begin, int64_t end, void* scratch) {
    kernels.backward(args, chosen, grad_weights_data, grad_probs_data, begin, end, out, scratch);
  });
  return grad_logits.to(router_logits.scalar_type());
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, CPU, m) {
  impl<topk_router>(m, "topk_router");
  impl<router_weights>(m, "_router_weights");
  impl<router_weights_backward>(m, "_router_weights_backward");
}

}  // namespace moe_ext::cpu
