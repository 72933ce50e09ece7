#include "ops/pairs.h"

#include <ATen/Parallel.h>

#include "common/types.h"
#include "cpu/kernels/pairs.h"
#include "cpu/plan.h"
#include "cpu/register.h"

namespace moe_ext::cpu {
namespace {

// The counts[e] tokens with the largest probs[:, e] among those that may go there, for every
// expert.
template <class T, class Allowed>
std::vector<std::vector<int64_t>> best_tokens(
    const T* probs, int64_t num_tokens, int64_t E, const std::vector<int64_t>& counts,
    const Allowed& allowed) {
  constexpr int64_t kBlock = kernels::kExpertsPerLine<T>;
  std::vector<std::vector<int64_t>> tokens(E);
  at::parallel_for(0, ceil_div(E, kBlock), 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kBlock, last = std::min(first + kBlock, E);
      kernels::best_tokens(probs, num_tokens, E, counts, allowed, first, last, tokens);
    }
  });
  return tokens;
}

template <class T>
void round_tokens_kernel(
    const T* probs, const T* weights, const int64_t* ids, int64_t num_tokens, int64_t K, int64_t E,
    const kernels::SlotsByExpert& slots, const std::vector<int64_t>& counts,
    kernels::PairWriter& pairs, int64_t* kept) {
  std::vector<int64_t> padding(E);
  for (int64_t e = 0; e < E; ++e) padding[e] = std::max<int64_t>(counts[e] - slots.count(e), 0);
  const auto padded = best_tokens(probs, num_tokens, E, padding, [&](int64_t t, int64_t e) {
    return kernels::is_routed_elsewhere(ids + t * K, K, E, e);
  });
  for (int64_t e = 0; e < E; ++e) {
    kernels::write_rounded(e, K, slots.best(e, weights, counts[e]), padded[e], pairs, kept);
  }
  pairs.finish();
}

// operators

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> round_tokens(
    const at::Tensor& router_probs, const at::Tensor& topk_weights, const at::Tensor& topk_ids,
    int64_t tile_size, c10::string_view rounding, const std::optional<at::Tensor>& capacity_factor,
    int64_t min_capacity, const std::optional<at::Tensor>& noise_) {
  const Rounding parsed = check_round_tokens(
      router_probs, topk_weights, topk_ids, tile_size, rounding, capacity_factor, min_capacity,
      noise_);
  const int64_t T = router_probs.size(0), E = router_probs.size(1), K = topk_ids.size(1);
  const at::ScalarType dtype = compute_dtype(router_probs.scalar_type());
  const at::Tensor probs = contiguous_in(router_probs, dtype);
  const at::Tensor weights = contiguous_in(topk_weights, dtype);
  const at::Tensor ids_tensor = read_ids("_round_tokens", topk_ids);
  const at::Tensor noise = contiguous_in(noise_, at::kDouble);
  const int64_t* ids = ids_tensor.const_data_ptr<int64_t>();

  const kernels::SlotsByExpert slots(ids, T * K, E);
  const int64_t routed = kernels::count_routed_tokens(ids, T, K, E);
  const int64_t most = capacity_factor ? capacity_of(
                                             *capacity_factor->const_data_ptr<double>(),
                                             slots.offsets[E], routed, E, min_capacity)
                                       : routed;
  std::vector<int64_t> chosen(E), counts(E);
  for (int64_t e = 0; e < E; ++e) chosen[e] = slots.count(e);
  for (int64_t e = 0; e < E; ++e) {
    counts[e] =
        round_count(chosen.data(), e, E, tile_size, most, parsed, data_or_null<double>(noise));
  }

  const auto outputs = empty_round_tokens_outputs(router_probs, topk_ids, tile_size, parsed);
  const auto& [pair_tokens, pair_experts, pair_slots, kept_ids] = outputs;
  kernels::PairWriter pairs{
      pair_tokens.mutable_data_ptr<int64_t>(), pair_experts.mutable_data_ptr<int64_t>(),
      pair_slots.mutable_data_ptr<int64_t>(), pair_tokens.numel()};
  int64_t* kept = kept_ids.fill_(-1).mutable_data_ptr<int64_t>();
  MOE_DISPATCH_COMPUTE(dtype, "round_tokens", [&] {
    round_tokens_kernel(
        probs.const_data_ptr<scalar_t>(), weights.const_data_ptr<scalar_t>(), ids, T, K, E, slots,
        counts, pairs, kept);
  });
  TORCH_INTERNAL_ASSERT(pairs.used <= pairs.size);
  return outputs;
}

std::tuple<at::Tensor, at::Tensor> expert_choice(
    const at::Tensor& router_probs, const std::optional<at::Tensor>& token_mask, int64_t top_k) {
  check_expert_choice(router_probs, token_mask, top_k);
  const int64_t T = router_probs.size(0), E = router_probs.size(1);
  const at::Tensor probs = contiguous_in(router_probs, compute_dtype(router_probs.scalar_type()));
  const at::Tensor mask_tensor = contiguous_in(token_mask, at::kBool);
  const bool* mask = data_or_null<bool>(mask_tensor);
  const int64_t unmasked = mask ? std::count(mask, mask + T, true) : T;
  const int64_t count = expert_choice_count(unmasked, E, top_k).expect_int();
  const auto outputs = empty_expert_choice_outputs(router_probs, top_k);
  const auto& [pair_tokens, pair_experts] = outputs;
  kernels::PairWriter pairs{
      pair_tokens.mutable_data_ptr<int64_t>(), pair_experts.mutable_data_ptr<int64_t>(), nullptr,
      pair_tokens.numel()};
  MOE_DISPATCH_COMPUTE(probs.scalar_type(), "expert_choice", [&] {
    const auto tokens = best_tokens(
        probs.const_data_ptr<scalar_t>(), T, E, std::vector<int64_t>(E, count),
        [mask](int64_t t, int64_t) { return !mask || mask[t]; });
    for (int64_t e = 0; e < E; ++e) {
      for (const int64_t t : tokens[e]) pairs.write(t, e, -1);
    }
  });
  pairs.finish();
  TORCH_INTERNAL_ASSERT(pairs.used <= pairs.size);
  return outputs;
}

// Checks that the pairs lie in what they index; an unused one has token -1.
void check_pair_values(
    const char* op, const int64_t* tokens, const int64_t* experts, const int64_t* slots, int64_t P,
    int64_t T, int64_t K, int64_t E) {
  for (int64_t p = 0; p < P; ++p) {
    if (tokens[p] == -1) continue;
    TORCH_CHECK_INDEX(
        tokens[p] >= 0 && tokens[p] < T, op, ": pair_tokens must be in [-1, T=", T, "), got ",
        tokens[p]);
    TORCH_CHECK_INDEX(
        experts[p] >= 0 && experts[p] < E, op, ": pair_experts must be in [0, E=", E,
        ") for a pair that is used, got ", experts[p]);
    TORCH_CHECK_INDEX(
        !slots || (slots[p] >= -1 && slots[p] < T * K), op,
        ": pair_slots must be in [-1, T K=", T * K, "), got ", slots ? slots[p] : 0);
  }
}

at::Tensor pair_weights(
    const at::Tensor& topk_weights_, const at::Tensor& router_probs, const at::Tensor& pair_tokens,
    const at::Tensor& pair_experts, const std::optional<at::Tensor>& pair_slots,
    int64_t num_experts, double scaling_factor) {
  check_pair_weights(
      topk_weights_, router_probs, pair_tokens, pair_experts, pair_slots, num_experts);
  const at::Tensor topk_weights = topk_weights_.contiguous(), probs = router_probs.contiguous();
  const at::Tensor tokens = pair_tokens.contiguous(), experts = pair_experts.contiguous();
  const at::Tensor slots = contiguous_in(pair_slots, at::kLong);
  const int64_t P = tokens.numel();
  check_pair_values(
      "_pair_weights", tokens.const_data_ptr<int64_t>(), experts.const_data_ptr<int64_t>(),
      data_or_null<int64_t>(slots), P, probs.size(0), topk_weights.size(1), num_experts);
  const at::Tensor out = empty_pair_weights(router_probs, pair_tokens);
  MOE_DISPATCH_COMPUTE(out.scalar_type(), "pair_weights", [&] {
    kernels::pair_weights(
        topk_weights.const_data_ptr<scalar_t>(), probs.const_data_ptr<scalar_t>(),
        tokens.const_data_ptr<int64_t>(), experts.const_data_ptr<int64_t>(),
        data_or_null<int64_t>(slots), P, num_experts, static_cast<scalar_t>(scaling_factor),
        out.mutable_data_ptr<scalar_t>());
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor> pair_weights_backward(
    const at::Tensor& grad_, const at::Tensor& topk_weights, const at::Tensor& pair_tokens,
    const at::Tensor& pair_experts, const std::optional<at::Tensor>& pair_slots,
    int64_t num_experts, double scaling_factor, std::array<bool, 2> output_mask) {
  check_pair_weights_backward(
      grad_, topk_weights, pair_tokens, pair_experts, pair_slots, num_experts);
  const at::Tensor grad = grad_.contiguous();
  const at::Tensor tokens = pair_tokens.contiguous(), experts = pair_experts.contiguous();
  const at::Tensor slots = contiguous_in(pair_slots, at::kLong);
  const int64_t P = tokens.numel();
  check_pair_values(
      "_pair_weights_backward", tokens.const_data_ptr<int64_t>(), experts.const_data_ptr<int64_t>(),
      data_or_null<int64_t>(slots), P, topk_weights.size(0), topk_weights.size(1), num_experts);
  const auto grads = empty_pair_weights_grads(topk_weights, num_experts, output_mask);
  const auto& [grad_weights, grad_probs] = grads;
  if (grad_weights.defined()) grad_weights.zero_();
  if (grad_probs.defined()) grad_probs.zero_();
  MOE_DISPATCH_COMPUTE(grad.scalar_type(), "pair_weights_backward", [&] {
    const auto data = [](const at::Tensor& tensor) {
      return tensor.defined() ? tensor.mutable_data_ptr<scalar_t>() : nullptr;
    };
    kernels::pair_weights_backward(
        grad.const_data_ptr<scalar_t>(), tokens.const_data_ptr<int64_t>(),
        experts.const_data_ptr<int64_t>(), data_or_null<int64_t>(slots), P, num_experts,
        static_cast<scalar_t>(scaling_factor), data(grad_weights), data(grad_probs));
  });
  return grads;
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, CPU, m) {
  impl<round_tokens>(m, "_round_tokens");
  impl<expert_choice>(m, "_expert_choice");
  impl<pair_weights>(m, "_pair_weights");
  impl<pair_weights_backward>(m, "_pair_weights_backward");
}

}  // namespace moe_ext::cpu
