#include "ops/topk_router.h"

#include <torch/library.h>

#include "cuda/operands.h"

namespace moe_ext::cuda {
namespace {

// logits: contiguous, in the compute dtype.
kernels::RouterArgs router_args(
    const char* op, const at::Tensor& logits, int64_t K, ScoreFunction score_function,
    bool renormalize, double scaling_factor) {
  const int64_t T = logits.size(0), E = logits.size(1);
  TORCH_CHECK(
      kernels::router_fits(type_of(logits), E, K), op,
      ": E and K must fit into 48 KiB of shared memory, ", "got E=", E, ", K=", K);
  return {type_of(logits),        T, E, K, score_function, renormalize, scaling_factor,
          logits.const_data_ptr()};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> topk_router(
    const at::Tensor& router_logits, int64_t top_k, c10::string_view score_function,
    bool renormalize, double scaling_factor, const std::optional<at::Tensor>& expert_bias,
    int64_t num_groups, int64_t topk_groups) {
  const TopkRouterOptions options = check_topk_router(
      router_logits, top_k, score_function, renormalize, scaling_factor, expert_bias, num_groups,
      topk_groups);
  const c10::cuda::CUDAGuard device_guard(router_logits.device());
  const at::ScalarType dtype = compute_dtype(router_logits.scalar_type());
  const at::Tensor logits = contiguous_in(router_logits, dtype);
  const at::Tensor bias = contiguous_in(expert_bias, dtype);
  const auto outputs = empty_topk_router_outputs(router_logits, top_k);
  const auto& [weights, ids, probs] = outputs;
  const kernels::RouterArgs args = router_args(
      "topk_router", logits, top_k, options.score_function, renormalize, scaling_factor);
  const auto stream = c10::cuda::getCurrentCUDAStream();
  kernels::choose_experts(
      args, any_data_or_null(bias), num_groups, topk_groups, ids.mutable_data_ptr<int64_t>(),
      stream);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  kernels::router_weights(
      args, ids.const_data_ptr<int64_t>(), weights.mutable_data_ptr(), probs.mutable_data_ptr(),
      stream);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return outputs;
}

std::tuple<at::Tensor, at::Tensor> router_weights(
    const at::Tensor& router_logits, const at::Tensor& topk_ids, c10::string_view score_function,
    bool renormalize, double scaling_factor) {
  const ScoreFunction parsed = check_router_weights(router_logits, topk_ids, score_function);
  const c10::cuda::CUDAGuard device_guard(router_logits.device());
  const at::Tensor logits =
      contiguous_in(router_logits, compute_dtype(router_logits.scalar_type()));
  const at::Tensor ids = contiguous_in(topk_ids, at::kLong);
  const auto outputs = empty_router_weights_outputs(router_logits, topk_ids);
  const kernels::RouterArgs args =
      router_args("_router_weights", logits, ids.size(1), parsed, renormalize, scaling_factor);
  kernels::router_weights(
      args, ids.const_data_ptr<int64_t>(), std::get<0>(outputs).mutable_data_ptr(),
      std::get<1>(outputs).mutable_data_ptr(), c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return outputs;
}

at::Tensor router_weights_backward(
    const std::optional<at::Tensor>& grad_weights_, const std::optional<at::Tensor>& grad_probs_,
    const at::Tensor& router_logits, const at::Tensor& topk_ids, c10::string_view score_function,
    bool renormalize, double scaling_factor) {
  const ScoreFunction parsed = check_router_weights_backward(
      grad_weights_, grad_probs_, router_logits, topk_ids, score_function);
  const c10::cuda::CUDAGuard device_guard(router_logits.device());
  const at::ScalarType dtype = compute_dtype(router_logits.scalar_type());
  const at::Tensor logits = contiguous_in(router_logits, dtype);
  const at::Tensor ids = contiguous_in(topk_ids, at::kLong);
  const at::Tensor grad_weights = contiguous_in(grad_weights_, dtype);
  const at::Tensor grad_probs = contiguous_in(grad_probs_, dtype);
  const at::Tensor grad_logits = empty_like_contiguous(logits);
  const kernels::RouterArgs args = router_args(
      "_router_weights_backward", logits, ids.size(1), parsed, renormalize, scaling_factor);
  kernels::router_weights_backward(
      args, ids.const_data_ptr<int64_t>(), any_data_or_null(grad_weights),
      any_data_or_null(grad_probs), grad_logits.mutable_data_ptr(),
      c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return grad_logits.to(router_logits.scalar_type());
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, CUDA, m) {
  m.impl("topk_router", topk_router);
  m.impl("_router_weights", router_weights);
  m.impl("_router_weights_backward", router_weights_backward);
}

}  // namespace moe_ext::cuda
