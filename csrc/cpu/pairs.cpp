#include "ops/pairs.h"

#include <ATen/Parallel.h>

#include "cpu/plan.h"
#include "cpu/register.h"
#include "cpu/select.h"

namespace moe_ext::cpu {
namespace {

// kernels

// The counts[e] tokens with the largest probs[:, e] among those that may go there, for every
// expert. One pass over the rows for every block of experts: a cache line of them.
template <class T, class Allowed>
std::vector<std::vector<int64_t>> best_tokens(
    const T* probs, int64_t num_tokens, int64_t E, const std::vector<int64_t>& counts,
    const Allowed& allowed) {
  constexpr int64_t kBlock = 64 / sizeof(T);
  std::vector<std::vector<int64_t>> tokens(E);
  at::parallel_for(0, (E + kBlock - 1) / kBlock, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kBlock, size = std::min(kBlock, E - first);
      std::vector<Best<T>> best;
      for (int64_t i = 0; i < size; ++i) best.emplace_back(counts[first + i]);
      // Most keys are no better than what is there: one comparison with a threshold, beside its
      // neighbours'. NaN is compared so that it passes, which costs time only.
      T threshold[kBlock];
      for (int64_t i = 0; i < size; ++i) threshold[i] = best[i].threshold();
      for (int64_t t = 0; t < num_tokens; ++t) {
        const T* row = probs + t * E + first;
        int candidates = 0;
        for (int64_t i = 0; i < size; ++i) candidates += !(row[i] <= threshold[i]);
        if (candidates == 0) continue;
        for (int64_t i = 0; i < size; ++i) {
          if (row[i] <= threshold[i] || !allowed(t, first + i)) continue;
          best[i].push(row[i], t);
          threshold[i] = best[i].threshold();
        }
      }
      for (int64_t i = 0; i < size; ++i) tokens[first + i] = best[i].take();
    }
  });
  return tokens;
}

// The list that the operators fill, in order; what is left at its end is unused.
struct PairWriter {
  int64_t *tokens, *experts, *slots;  // slots may be null
  int64_t size;
  int64_t used = 0;

  void write(int64_t token, int64_t expert, int64_t slot) {
    TORCH_INTERNAL_ASSERT(used < size);
    tokens[used] = token;
    experts[used] = expert;
    if (slots) slots[used] = slot;
    ++used;
  }
  void finish() {
    std::fill(tokens + used, tokens + size, -1);
    std::fill(experts + used, experts + size, -1);
    if (slots) std::fill(slots + used, slots + size, -1);
  }
};

template <class T>
void round_tokens_kernel(
    const T* probs, const T* weights, const int64_t* ids, int64_t num_tokens, int64_t K, int64_t E,
    const SlotsByExpert& slots, const std::vector<int64_t>& counts, PairWriter pairs,
    int64_t* kept) {
  std::vector<int64_t> padding(E);
  for (int64_t e = 0; e < E; ++e) padding[e] = std::max<int64_t>(counts[e] - slots.count(e), 0);
  const auto padded = best_tokens(probs, num_tokens, E, padding, [&](int64_t t, int64_t e) {
    bool routed = false;
    for (int64_t k = 0; k < K; ++k) {
      const int64_t id = ids[t * K + k];
      if (id == e) return false;
      routed = routed || is_valid(id, E);
    }
    return routed;
  });
  for (int64_t e = 0; e < E; ++e) {
    const std::vector<int64_t> chosen = slots.best(e, weights, counts[e]);
    auto slot = chosen.begin();
    auto token = padded[e].begin();
    while (slot != chosen.end() || token != padded[e].end()) {
      if (token == padded[e].end() || (slot != chosen.end() && *slot / K < *token)) {
        kept[*slot] = e;
        pairs.write(*slot / K, e, *slot);
        ++slot;
      } else {
        pairs.write(*token++, e, -1);
      }
    }
  }
  pairs.finish();
}

template <class T>
void pair_weights_kernel(
    const T* topk_weights, const T* probs, const int64_t* tokens, const int64_t* experts,
    const int64_t* slots, int64_t P, int64_t E, T scale, T* out) {
  for (int64_t p = 0; p < P; ++p) {
    out[p] = tokens[p] < 0            ? T(0)
             : slots && slots[p] >= 0 ? topk_weights[slots[p]]
                                      : scale * probs[tokens[p] * E + experts[p]];
  }
}

// No two pairs have the same slot, nor the same token and expert. Either gradient may be null.
template <class T>
void pair_weights_backward_kernel(
    const T* grad, const int64_t* tokens, const int64_t* experts, const int64_t* slots, int64_t P,
    int64_t E, T scale, T* grad_weights, T* grad_probs) {
  for (int64_t p = 0; p < P; ++p) {
    if (tokens[p] < 0) continue;
    if (slots && slots[p] >= 0) {
      if (grad_weights) grad_weights[slots[p]] = grad[p];
    } else if (grad_probs) {
      grad_probs[tokens[p] * E + experts[p]] = scale * grad[p];
    }
  }
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

  const SlotsByExpert slots(ids, T * K, E);
  const int64_t routed = count_routed_tokens(ids, T, K, E);
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
  const PairWriter pairs{
      pair_tokens.mutable_data_ptr<int64_t>(), pair_experts.mutable_data_ptr<int64_t>(),
      pair_slots.mutable_data_ptr<int64_t>(), pair_tokens.numel()};
  int64_t* kept = kept_ids.fill_(-1).mutable_data_ptr<int64_t>();
  MOE_DISPATCH_COMPUTE(dtype, "round_tokens", [&] {
    round_tokens_kernel(
        probs.const_data_ptr<scalar_t>(), weights.const_data_ptr<scalar_t>(), ids, T, K, E, slots,
        counts, pairs, kept);
  });
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
  PairWriter pairs{
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
    pair_weights_kernel(
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
    pair_weights_backward_kernel(
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
