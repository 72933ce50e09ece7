// The router's score functions, one token (row) at a time, for the host and for nvcc.
//
//   logits  z [E]     ids [K]: a choice is valid if 0 <= id < E; others have weight and gradient 0
//   probs   P [E]     what the balance losses see; sums to 1
//   weights w [K]     c * score of the choice, normalized over the valid choices if `renormalize`
//
// `key` is what the choice ranks by where a bias or groups are used; without them it is the logit,
// which has the same order and no rounding. An id may occur twice in a row: its gradients add up.
// A NaN anywhere in z makes every weight of the row NaN, so that a loss scaler sees it.
//
// To add one: a struct here, its name in ops/score_function.h, one line in moe_ext/reference.py.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/host_device.h"

namespace moe_ext {

MOE_HOST_DEVICE bool is_valid(int64_t id, int64_t num_experts) {
  return id >= 0 && id < num_experts;
}

template <class T>
MOE_HOST_DEVICE bool has_nan(const T* z, int64_t n) {
  bool found = false;
  for (int64_t e = 0; e < n; ++e) found |= z[e] != z[e];
  return found;
}

template <class T>
MOE_HOST_DEVICE T max_or_nan(const T* z, int64_t n) {
  T top = z[0];
  for (int64_t e = 1; e < n; ++e) top = z[e] > top || z[e] != z[e] ? z[e] : top;
  return top;
}

// log(sum_e exp(z_e)) of a row.
template <class T>
MOE_HOST_DEVICE T log_sum_exp(const T* z, int64_t n) {
  const T top = max_or_nan(z, n);
  if (std::isinf(top)) return top;
  T sum = 0;
  for (int64_t e = 0; e < n; ++e) sum += std::exp(z[e] - top);
  return top + std::log(sum);
}

template <class T>
MOE_HOST_DEVICE void softmax(const T* z, int64_t n, T* p) {
  const T top = max_or_nan(z, n);
  T sum = 0;
  for (int64_t e = 0; e < n; ++e) sum += p[e] = std::exp(z[e] - top);
  for (int64_t e = 0; e < n; ++e) p[e] /= sum;
}

// y_k = softmax of z over the valid choices, 0 elsewhere (all zeros if none is valid). Taken from
// the logits, not from the probabilities, which can all underflow when a bias or groups choose.
template <class T, class Id>
MOE_HOST_DEVICE void softmax_of_choices(const T* z, int64_t E, const Id* ids, int64_t K, T* y) {
  bool any = false;
  T top = 0;
  for (int64_t k = 0; k < K; ++k) {
    if (!is_valid(ids[k], E)) continue;
    const T v = z[ids[k]];
    top = !any || v > top || v != v ? v : top;
    any = true;
  }
  T sum = 0;
  for (int64_t k = 0; k < K; ++k) {
    y[k] = is_valid(ids[k], E) ? std::exp(z[ids[k]] - top) : T(0);
    sum += y[k];
  }
  if (any) {
    for (int64_t k = 0; k < K; ++k) y[k] /= sum;
  }
}

struct Softmax {
  template <class T>
  static MOE_HOST_DEVICE void probs(const T* z, int64_t E, T* P) {
    softmax(z, E, P);
  }

  template <class T>
  static MOE_HOST_DEVICE T key(T, T prob) {
    return prob;
  }

  // DeepSeek-V2 ranks a group by its best expert.
  static constexpr int kGroupTop = 1;

  template <class T, class Id>
  static MOE_HOST_DEVICE void weights(
      const T* z, const T* P, int64_t E, const Id* ids, int64_t K, bool renormalize, T c, T* w) {
    if (renormalize) {
      softmax_of_choices(z, E, ids, K, w);
    } else {
      for (int64_t k = 0; k < K; ++k) w[k] = is_valid(ids[k], E) ? P[ids[k]] : T(0);
    }
    for (int64_t k = 0; k < K; ++k) w[k] *= c;
  }

  // dz [E] is written. ds [K] and dP [E] may be null: no gradient. work holds E + K numbers.
  template <class T, class Id>
  static MOE_HOST_DEVICE void backward(
      const T* z, int64_t E, const Id* ids, int64_t K, bool renormalize, T c, const T* ds,
      const T* dP, T* dz, T* work) {
    T* p = work;
    T* y = work + E;
    softmax(z, E, p);
    // Everything that reaches z through the full softmax has one form, p (q - <p, q>).
    for (int64_t e = 0; e < E; ++e) dz[e] = dP ? dP[e] : T(0);
    if (ds && !renormalize) {
      for (int64_t k = 0; k < K; ++k) {
        if (is_valid(ids[k], E)) dz[ids[k]] += c * ds[k];
      }
    }
    T dot = 0;
    for (int64_t e = 0; e < E; ++e) dot += p[e] * dz[e];
    for (int64_t e = 0; e < E; ++e) dz[e] = p[e] * (dz[e] - dot);
    if (ds && renormalize) {
      softmax_of_choices(z, E, ids, K, y);
      T mean = 0;
      for (int64_t k = 0; k < K; ++k) mean += is_valid(ids[k], E) ? y[k] * ds[k] : T(0);
      for (int64_t k = 0; k < K; ++k) {
        if (is_valid(ids[k], E)) dz[ids[k]] += c * y[k] * (ds[k] - mean);
      }
    }
  }
};

struct Sigmoid {
  template <class T>
  static MOE_HOST_DEVICE T score(T z) {
    return T(1) / (T(1) + std::exp(-z));
  }

  template <class T>
  static MOE_HOST_DEVICE void probs(const T* z, int64_t E, T* P) {
    T sum = 0;
    for (int64_t e = 0; e < E; ++e) sum += P[e] = score(z[e]);
    for (int64_t e = 0; e < E; ++e) P[e] /= sum;
  }

  template <class T>
  static MOE_HOST_DEVICE T key(T z, T) {
    return score(z);
  }

  // DeepSeek-V3 ranks a group by the sum of its best two experts.
  static constexpr int kGroupTop = 2;

  template <class T, class Id>
  static MOE_HOST_DEVICE void weights(
      const T* z, const T*, int64_t E, const Id* ids, int64_t K, bool renormalize, T c, T* w) {
    T sum = 0;
    for (int64_t k = 0; k < K; ++k) sum += w[k] = is_valid(ids[k], E) ? score(z[ids[k]]) : T(0);
    const T scale = renormalize ? c / (sum + T(kEps)) : c;
    for (int64_t k = 0; k < K; ++k) w[k] *= scale;
  }

  template <class T, class Id>
  static MOE_HOST_DEVICE void backward(
      const T* z, int64_t E, const Id* ids, int64_t K, bool renormalize, T c, const T* ds,
      const T* dP, T* dz, T*) {
    for (int64_t e = 0; e < E; ++e) dz[e] = 0;
    if (dP) {
      T sum = 0, dot = 0;
      for (int64_t e = 0; e < E; ++e) {
        const T y = score(z[e]);
        sum += y;
        dot += y * dP[e];
      }
      for (int64_t e = 0; e < E; ++e) dz[e] = slope(z[e]) / sum * (dP[e] - dot / sum);
    }
    if (!ds) return;
    T scale = c, mean = 0;
    if (renormalize) {
      T sum = 0;
      for (int64_t k = 0; k < K; ++k) {
        if (!is_valid(ids[k], E)) continue;
        const T y = score(z[ids[k]]);
        sum += y;
        mean += y * ds[k];
      }
      scale = c / (sum + T(kEps));
      mean /= sum + T(kEps);
    }
    for (int64_t k = 0; k < K; ++k) {
      if (is_valid(ids[k], E)) dz[ids[k]] += scale * (ds[k] - mean) * slope(z[ids[k]]);
    }
  }

 private:
  static constexpr double kEps = 1e-20;
  template <class T>
  static MOE_HOST_DEVICE T slope(T z) {
    const T y = score(z);
    return y * (T(1) - y);
  }
};

}  // namespace moe_ext
