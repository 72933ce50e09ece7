#include "ops/topk_router.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <vector>

namespace moe_ext::cpu {
namespace {

constexpr int64_t kTokensPerTask = 64;

// kernels

// The order of a choice: larger first, NaN last. Scans go by ascending id and need a strictly
// better key to overtake, so that ties stay with the lower id.
template <class T>
bool is_better(T a, T b) {
  return a > b || (a == a && b != b);
}

// Keeps the `limit` best of what is offered, best first.
template <class T>
struct BestList {
  int64_t limit;
  int64_t count = 0;
  std::vector<T> keys;
  std::vector<int64_t> ids;

  explicit BestList(int64_t limit) : limit(limit), keys(limit), ids(limit) {}

  void offer(T key, int64_t id) {
    int64_t at = count;
    while (at > 0 && is_better(key, keys[at - 1])) --at;
    if (at == limit) return;
    if (count < limit) ++count;
    for (int64_t i = count - 1; i > at; --i) {
      keys[i] = keys[i - 1];
      ids[i] = ids[i - 1];
    }
    keys[at] = key;
    ids[at] = id;
  }
};

// A group's score is the sum of its best `top` keys; a NaN key counts as -inf.
template <class T>
T group_score(const T* keys, int64_t size, int64_t top) {
  BestList<T> best(std::min(top, size));
  for (int64_t e = 0; e < size; ++e) {
    best.offer(keys[e] == keys[e] ? keys[e] : -std::numeric_limits<T>::infinity(), e);
  }
  T sum = 0;
  for (int64_t i = 0; i < best.count; ++i) sum += best.keys[i];
  return sum;
}

template <class Score, class T>
void topk_router_kernel(
    const T* logits, const T* bias, int64_t T_, int64_t E, int64_t K,
    const TopkRouterOptions& options, T* weights, int64_t* ids, T* probs) {
  const int64_t group_size = E / options.num_groups;
  const bool rank_by_logit = !bias && options.num_groups == 1;
  at::parallel_for(0, T_, kTokensPerTask, [&](int64_t begin, int64_t end) {
    std::vector<T> scores(E);
    for (int64_t t = begin; t < end; ++t) {
      const T* z = logits + t * E;
      T* P = probs + t * E;
      Score::probs(z, E, P);
      const T* keys = z;
      if (!rank_by_logit) {
        for (int64_t e = 0; e < E; ++e) scores[e] = Score::key(z[e], P[e]) + (bias ? bias[e] : 0);
        keys = scores.data();
      }
      BestList<T> groups(options.topk_groups);
      for (int64_t g = 0; g < options.num_groups; ++g) {
        const bool choose = options.topk_groups < options.num_groups;
        groups.offer(
            choose ? group_score(keys + g * group_size, group_size, Score::kGroupTop) : T(0), g);
      }
      std::sort(groups.ids.begin(), groups.ids.end());
      BestList<T> best(K);
      for (const int64_t g : groups.ids) {
        for (int64_t e = g * group_size; e < (g + 1) * group_size; ++e) best.offer(keys[e], e);
      }
      std::copy(best.ids.begin(), best.ids.end(), ids + t * K);
      Score::weights(
          z, P, E, ids + t * K, K, options.renormalize, static_cast<T>(options.scaling_factor),
          weights + t * K);
      if (has_nan(z, E)) {
        std::fill_n(weights + t * K, K, std::numeric_limits<T>::quiet_NaN());
      }
    }
  });
}

template <class Score, class T>
void router_weights_kernel(
    const T* logits, const int64_t* ids, int64_t T_, int64_t E, int64_t K, bool renormalize,
    T scaling_factor, T* weights, T* probs) {
  at::parallel_for(0, T_, kTokensPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const T* z = logits + t * E;
      Score::probs(z, E, probs + t * E);
      Score::weights(
          z, probs + t * E, E, ids + t * K, K, renormalize, scaling_factor, weights + t * K);
      if (!has_nan(z, E)) continue;
      for (int64_t k = 0; k < K; ++k) {
        if (is_valid(ids[t * K + k], E)) {
          weights[t * K + k] = std::numeric_limits<T>::quiet_NaN();
        }
      }
    }
  });
}

template <class Score, class T>
void router_weights_backward_kernel(
    const T* grad_weights, const T* grad_probs, const T* logits, const int64_t* ids, int64_t T_,
    int64_t E, int64_t K, bool renormalize, T scaling_factor, T* grad_logits) {
  at::parallel_for(0, T_, kTokensPerTask, [&](int64_t begin, int64_t end) {
    std::vector<T> work(E + K);
    for (int64_t t = begin; t < end; ++t) {
      Score::backward(
          logits + t * E, E, ids + t * K, K, renormalize, scaling_factor,
          grad_weights ? grad_weights + t * K : nullptr, grad_probs ? grad_probs + t * E : nullptr,
          grad_logits + t * E, work.data());
    }
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
  MOE_DISPATCH_COMPUTE(dtype, "topk_router", [&] {
    dispatch_score_function(options.score_function, [&](auto score) {
      topk_router_kernel<decltype(score)>(
          logits.const_data_ptr<scalar_t>(), data_or_null<scalar_t>(bias), logits.size(0),
          logits.size(1), top_k, options, std::get<0>(outputs).mutable_data_ptr<scalar_t>(),
          std::get<1>(outputs).mutable_data_ptr<int64_t>(),
          std::get<2>(outputs).mutable_data_ptr<scalar_t>());
    });
  });
  return outputs;
}

std::tuple<at::Tensor, at::Tensor> router_weights(
    const at::Tensor& router_logits, const at::Tensor& topk_ids, c10::string_view score_function,
    bool renormalize, double scaling_factor) {
  const ScoreFunction parsed = check_router_weights(router_logits, topk_ids, score_function);
  const at::ScalarType dtype = compute_dtype(router_logits.scalar_type());
  const at::Tensor logits = contiguous_in(router_logits, dtype);
  const at::Tensor ids = contiguous_in(topk_ids, at::kLong);
  const auto outputs = empty_router_weights_outputs(router_logits, topk_ids);
  MOE_DISPATCH_COMPUTE(dtype, "router_weights", [&] {
    dispatch_score_function(parsed, [&](auto score) {
      router_weights_kernel<decltype(score)>(
          logits.const_data_ptr<scalar_t>(), ids.const_data_ptr<int64_t>(), logits.size(0),
          logits.size(1), ids.size(1), renormalize, static_cast<scalar_t>(scaling_factor),
          std::get<0>(outputs).mutable_data_ptr<scalar_t>(),
          std::get<1>(outputs).mutable_data_ptr<scalar_t>());
    });
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
  const at::Tensor ids = contiguous_in(topk_ids, at::kLong);
  const at::Tensor grad_weights = contiguous_in(grad_weights_, dtype);
  const at::Tensor grad_probs = contiguous_in(grad_probs_, dtype);
  const at::Tensor grad_logits = empty_like_contiguous(logits);
  MOE_DISPATCH_COMPUTE(dtype, "router_weights_backward", [&] {
    dispatch_score_function(parsed, [&](auto score) {
      router_weights_backward_kernel<decltype(score)>(
          data_or_null<scalar_t>(grad_weights), data_or_null<scalar_t>(grad_probs),
          logits.const_data_ptr<scalar_t>(), ids.const_data_ptr<int64_t>(), logits.size(0),
          logits.size(1), ids.size(1), renormalize, static_cast<scalar_t>(scaling_factor),
          grad_logits.mutable_data_ptr<scalar_t>());
    });
  });
  return grad_logits.to(router_logits.scalar_type());
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, CPU, m) {
  m.impl("topk_router", topk_router);
  m.impl("_router_weights", router_weights);
  m.impl("_router_weights_backward", router_weights_backward);
}

}  // namespace moe_ext::cpu
