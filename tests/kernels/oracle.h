// What the kernels are to compute, by plain loops in double.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

#include "common/activation.h"
#include "common/score_function.h"

namespace oracle {

using Numbers = std::vector<double>;

// Rows grouped by expert; row r is of token[r], or, without any, of token r.
struct Groups {
  std::vector<int32_t> offsets;
  std::vector<int32_t> token = {};

  int64_t E() const { return static_cast<int64_t>(offsets.size()) - 1; }
  int64_t used() const { return offsets.back(); }
  int64_t token_of(int64_t row) const { return token.empty() ? row : token[row]; }
  // fn(row, expert) for all rows.
  template <class Fn>
  void each(const Fn& fn) const {
    for (int64_t e = 0; e < E(); ++e) {
      for (int64_t row = offsets[e]; row < offsets[e + 1]; ++row) fn(row, e);
    }
  }
};

// sums[r] += x[token of r] weights[e]^T: x [., K], weights [E, N, K], or [E, K, N] if k is not
// dense.
inline void add_product(
    const Groups& groups, const Numbers& x, const Numbers& weights, int64_t N, int64_t K,
    bool k_dense, Numbers& sums) {
  groups.each([&](int64_t r, int64_t e) {
    const double* row = &x[groups.token_of(r) * K];
    const double* w = &weights[e * N * K];
    for (int64_t n = 0; n < N; ++n) {
      double sum = 0;
      for (int64_t k = 0; k < K; ++k) sum += row[k] * w[k_dense ? n * K + k : k * N + n];
      sums[r * N + n] += sum;
    }
  });
}

// sums[r] += bias[e], bias [E, N].
inline void add_bias(const Groups& groups, const Numbers& bias, int64_t N, Numbers& sums) {
  groups.each([&](int64_t r, int64_t e) {
    for (int64_t n = 0; n < N; ++n) sums[r * N + n] += bias[e * N + n];
  });
}

// [E, M, N]: the sum over e's rows of left[r]^T right[token of r].
inline Numbers grad_weights(
    const Groups& groups, const Numbers& left, const Numbers& right, int64_t M, int64_t N) {
  Numbers grad(groups.E() * M * N);
  groups.each([&](int64_t r, int64_t e) {
    for (int64_t m = 0; m < M; ++m) {
      for (int64_t n = 0; n < N; ++n) {
        grad[(e * M + m) * N + n] += left[r * M + m] * right[groups.token_of(r) * N + n];
      }
    }
  });
  return grad;
}

// [E, N]: the sum over e's rows of weights[r] * rows[r].
inline Numbers sum_rows(
    const Groups& groups, const Numbers& rows, const Numbers& weights, int64_t N) {
  Numbers sums(groups.E() * N);
  groups.each([&](int64_t r, int64_t e) {
    for (int64_t n = 0; n < N; ++n) sums[e * N + n] += weights[r] * rows[r * N + n];
  });
  return sums;
}

// From hidden [rows, 2I] or [rows, I] (its bias is in it) and grad [rows, I], the gradient of the
// unweighted activations; rows that are not used stay `blank`.
struct Activated {
  Numbers activated, weighted;  // [rows, I]
  Numbers grad_hidden;          // like hidden
  Numbers dots;                 // [rows]: <activated, grad>
};
inline Activated activate(
    const Groups& groups, moe_ext::Activation activation, bool gated, const Numbers& hidden,
    const Numbers& grad, const Numbers& weights, int64_t I, double blank = 0) {
  const int64_t W = gated ? 2 * I : I, rows = static_cast<int64_t>(weights.size());
  Activated result{
      Numbers(rows * I, blank), Numbers(rows * I, blank), Numbers(rows * W, blank),
      Numbers(rows, blank)};
  moe_ext::dispatch_activation(activation, gated, [&](auto f) {
    using F = decltype(f);
    groups.each([&](int64_t r, int64_t) {
      double dot = 0;
      for (int64_t i = 0; i < I; ++i) {
        const double gate = hidden[r * W + i], up = gated ? hidden[r * W + I + i] : 0;
        const double value = F::value(gate, up);
        double grad_up = 0;
        F::grad(gate, up, weights[r] * grad[r * I + i], &result.grad_hidden[r * W + i], &grad_up);
        if (gated) result.grad_hidden[r * W + I + i] = grad_up;
        result.activated[r * I + i] = value;
        result.weighted[r * I + i] = weights[r] * value;
        dot += value * grad[r * I + i];
      }
      result.dots[r] = dot;
    });
  });
  return result;
}

// A stable sort of slots by expert; skipped ones have row -1.
struct Plan {
  std::vector<int32_t> row_map, slot_of_row;  // slot_of_row: -1 past the last row
  Groups groups;
};
inline Plan plan(const std::vector<int64_t>& ids, int64_t K, int64_t E) {
  const int64_t N = static_cast<int64_t>(ids.size());
  Plan result{std::vector<int32_t>(N, -1), std::vector<int32_t>(N, -1), {{0}, {}}};
  int32_t row = 0;
  for (int64_t e = 0; e < E; ++e) {
    for (int64_t slot = 0; slot < N; ++slot) {
      if (ids[slot] != e) continue;
      result.groups.token.push_back(static_cast<int32_t>(slot / K));
      result.slot_of_row[row] = static_cast<int32_t>(slot);
      result.row_map[slot] = row++;
    }
    result.groups.offsets.push_back(row);
  }
  return result;
}

struct Unpermuted {
  Numbers out;                      // [T, H]
  Numbers grad_rows, grad_weights;  // [N, H] and [N]
};
inline Unpermuted unpermute(
    const std::vector<int32_t>& row_map, int64_t K, int64_t H, const Numbers& rows,
    const Numbers& weights, const Numbers& grad_out) {
  const int64_t N = static_cast<int64_t>(row_map.size());
  Unpermuted result{Numbers(N / K * H), Numbers(N * H), Numbers(N)};
  for (int64_t slot = 0; slot < N; ++slot) {
    const int64_t row = row_map[slot], t = slot / K;
    if (row < 0) continue;
    for (int64_t h = 0; h < H; ++h) {
      result.out[t * H + h] += weights[slot] * rows[row * H + h];
      result.grad_rows[row * H + h] = weights[slot] * grad_out[t * H + h];
      result.grad_weights[slot] += grad_out[t * H + h] * rows[row * H + h];
    }
  }
  return result;
}

struct Router {
  int64_t T, E, K, groups, topk_groups;
  moe_ext::ScoreFunction score;
  bool renormalize;
  double scale;

  bool is_softmax() const { return score == moe_ext::ScoreFunction::kSoftmax; }
  // Of one token: what the probabilities are proportional to, and its derivative by the logit.
  Numbers values(const double* z) const {
    Numbers v(E);
    for (int64_t e = 0; e < E; ++e) {
      v[e] = is_softmax() ? std::exp(z[e]) : 1 / (1 + std::exp(-z[e]));
    }
    return v;
  }
  double slope(double value) const { return is_softmax() ? value : value * (1 - value); }
};

// NaN last, then the lower index.
inline std::vector<int64_t> best_first(const Numbers& keys) {
  std::vector<int64_t> order(keys.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return keys[a] > keys[b] || (keys[a] == keys[a] && keys[b] != keys[b]);
  });
  return order;
}

// ids [T, K]. bias [E], or empty.
inline std::vector<int64_t> choose(
    const Router& router, const Numbers& logits, const Numbers& bias) {
  const int64_t E = router.E, size = E / router.groups;
  std::vector<int64_t> ids;
  for (int64_t t = 0; t < router.T; ++t) {
    const double* z = &logits[t * E];
    Numbers keys(z, z + E);
    if (!bias.empty() || router.groups > 1) {
      keys = router.values(z);
      const double all = std::accumulate(keys.begin(), keys.end(), 0.0);
      for (int64_t e = 0; e < E; ++e) {
        if (router.is_softmax()) keys[e] /= all;
        if (!bias.empty()) keys[e] += bias[e];
      }
    }
    Numbers scores;
    for (int64_t g = 0; g < router.groups; ++g) {
      Numbers own(keys.begin() + g * size, keys.begin() + (g + 1) * size);
      for (double& key : own) key = key == key ? key : -INFINITY;
      std::sort(own.rbegin(), own.rend());
      scores.push_back(router.is_softmax() || size == 1 ? own[0] : own[0] + own[1]);
    }
    std::vector<bool> chosen(router.groups, false);
    const std::vector<int64_t> groups = best_first(scores);
    for (int64_t g = 0; g < router.topk_groups; ++g) chosen[groups[g]] = true;
    int64_t left = router.K;
    for (const int64_t e : best_first(keys)) {
      if (chosen[e / size] && left-- > 0) ids.push_back(e);
    }
  }
  return ids;
}

struct Routed {
  Numbers weights, probs;  // [T, K] and [T, E]
};
inline Routed weigh(const Router& router, const Numbers& logits, const std::vector<int64_t>& ids) {
  const int64_t E = router.E, K = router.K;
  Routed result{Numbers(router.T * K), Numbers(router.T * E)};
  for (int64_t t = 0; t < router.T; ++t) {
    const double* z = &logits[t * E];
    const Numbers v = router.values(z);
    const double all = std::accumulate(v.begin(), v.end(), 0.0);
    double chosen = 0;
    for (int64_t e = 0; e < E; ++e) result.probs[t * E + e] = v[e] / all;
    const auto is_valid = [&](int64_t id) { return id >= 0 && id < E; };
    for (int64_t k = 0; k < K; ++k) {
      if (is_valid(ids[t * K + k])) chosen += v[ids[t * K + k]];
    }
    const double divisor = router.renormalize ? chosen : router.is_softmax() ? all : 1;
    for (int64_t k = 0; k < K; ++k) {
      const int64_t id = ids[t * K + k];
      if (!is_valid(id)) continue;
      result.weights[t * K + k] = all == all ? router.scale * v[id] / divisor : NAN;
    }
  }
  return result;
}

// [T, E]. grad_weights [T, K] and grad_probs [T, E] may be empty: no gradient.
inline Numbers router_backward(
    const Router& router, const Numbers& logits, const std::vector<int64_t>& ids,
    const Numbers& grad_weights, const Numbers& grad_probs) {
  const int64_t E = router.E, K = router.K;
  Numbers grad(router.T * E);
  for (int64_t t = 0; t < router.T; ++t) {
    const Numbers v = router.values(&logits[t * E]);
    const double all = std::accumulate(v.begin(), v.end(), 0.0);
    double* dz = &grad[t * E];
    // Of what reaches the logits through the probabilities.
    Numbers q(E);
    for (int64_t e = 0; e < E && !grad_probs.empty(); ++e) q[e] = grad_probs[t * E + e];
    // fn(k, id) for the valid choices.
    const auto each_choice = [&](const auto& fn) {
      for (int64_t k = 0; k < K && !grad_weights.empty(); ++k) {
        const int64_t id = ids[t * K + k];
        if (id >= 0 && id < E) fn(t * K + k, id);
      }
    };
    if (router.is_softmax() && !router.renormalize) {
      each_choice([&](int64_t s, int64_t id) { q[id] += router.scale * grad_weights[s]; });
    }
    if (router.is_softmax() || !grad_probs.empty()) {
      double mean = 0;
      for (int64_t e = 0; e < E; ++e) mean += v[e] / all * q[e];
      for (int64_t e = 0; e < E; ++e) dz[e] = router.slope(v[e]) / all * (q[e] - mean);
    }
    if (router.is_softmax() && !router.renormalize) continue;
    double chosen = 0, mean = 0;
    each_choice([&](int64_t, int64_t id) { chosen += v[id]; });
    each_choice([&](int64_t s, int64_t id) { mean += v[id] / chosen * grad_weights[s]; });
    if (!router.renormalize) chosen = 1, mean = 0;
    each_choice([&](int64_t s, int64_t id) {
      dz[id] += router.scale / chosen * router.slope(v[id]) * (grad_weights[s] - mean);
    });
  }
  return grad;
}

// The mean over the tokens with used(t) of log(sum exp(logits))^2, and its gradient.
struct ZLoss {
  double loss = 0;
  Numbers grad;
};
template <class Used>
ZLoss z_loss(const Numbers& logits, int64_t T, int64_t E, const Used& used) {
  int64_t count = 0;
  for (int64_t t = 0; t < T; ++t) count += used(t);
  ZLoss result{0, Numbers(T * E)};
  for (int64_t t = 0; t < T; ++t) {
    if (!used(t)) continue;
    double sum = 0;
    for (int64_t e = 0; e < E; ++e) sum += std::exp(logits[t * E + e]);
    const double lse = std::log(sum);
    result.loss += lse * lse / count;
    for (int64_t e = 0; e < E; ++e) {
      result.grad[t * E + e] = 2 * lse * std::exp(logits[t * E + e]) / sum / count;
    }
  }
  return result;
}

// The `count` candidates with the largest keys, ascending; NaN counts as -infinity, ties go to the
// earlier one.
template <class T>
std::vector<int64_t> best(std::vector<int64_t> candidates, const T* keys, int64_t count) {
  const auto key = [&](int64_t i) { return keys[i] == keys[i] ? keys[i] : T(-INFINITY); };
  std::stable_sort(
      candidates.begin(), candidates.end(), [&](int64_t a, int64_t b) { return key(a) > key(b); });
  candidates.resize(std::min<int64_t>(count, candidates.size()));
  std::sort(candidates.begin(), candidates.end());
  return candidates;
}

}  // namespace oracle
