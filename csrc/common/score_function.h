// The router's score functions, one token (row) at a time, for the host and for nvcc.
//
//   logits  z [E]     ids [K]: a choice is valid if 0 <= id < E; others have weight and gradient 0
//   probs   P [E]     what the balance losses see; sums to 1
//   weights w [K]     c * score of the choice, normalized over the valid choices if `renormalize`
//
// `keys` are what the choice ranks by where a bias or groups are used; without them it is the
// logits, which have the same order and no rounding. An id may occur twice in a row: its gradients
// add up. A NaN anywhere in z makes every weight of the row NaN, so that a loss scaler sees it.
//
// How a row is walked, several numbers at a time, is up to `Row`:
//   Row::Scalar, Row::V            a number, and a vector of them
//   Row::each(n, fn)               fn(at) for all places of a row of n; at(p) reads the place of p,
//                                  at.set(p, v) writes it
//   Row::sum(n, fn)                the sum of fn(at) over the row
//   Row::max_or_nan(z, n)          the largest number, or NaN if there is one
//   Row::once(fn)                  calls fn once for the row: several threads may walk a row
//                                  together, each its own places. What any of them wrote is seen in
//                                  fn, and what fn wrote is seen by all; other places are private.
//
// To add one: a struct here with the members of Softmax, an entry of ScoreFunction and a case of
// dispatch_score_function; docs/developing.md lists the other files.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/activation.h"
#include "common/host_device.h"

namespace moe_ext {

enum class ScoreFunction { kSoftmax, kSigmoid };

static MOE_HOST_DEVICE bool is_valid(int64_t id, int64_t num_experts) {
  return id >= 0 && id < num_experts;
}

// p = exp(z - top), top the row's largest number; sum that of p.
template <class T>
struct ExpSum {
  T top, sum;
};
template <class Row, class T = typename Row::Scalar>
MOE_HOST_DEVICE ExpSum<T> exp_row(const T* z, int64_t n, T* p) {
  using V = typename Row::V;
  const T top = Row::max_or_nan(z, n);
  const T sum = Row::sum(n, [&](auto at) {
    const V y = exp(at(z) - V(top));
    at.set(p, y);
    return y;
  });
  return {top, sum};
}

template <class Row, class T = typename Row::Scalar>
MOE_HOST_DEVICE void softmax(const T* z, int64_t n, T* p) {
  const typename Row::V sum(exp_row<Row>(z, n, p).sum);
  Row::each(n, [&](auto at) { at.set(p, at(p) / sum); });
}

template <class Row, class T = typename Row::Scalar>
MOE_HOST_DEVICE T log_sum_exp(ExpSum<T> row) {
  if (row.top - row.top != T(0)) return row.top;  // infinite or NaN
  return row.top + static_cast<T>(::log(static_cast<double>(row.sum)));
}

// A group's score is the sum of its best kTop keys; a NaN key counts as -inf.
template <int kTop, class T>
static MOE_HOST_DEVICE T group_score(const T* keys, int64_t size) {
  T first = T(-INFINITY), second = T(-INFINITY);
  for (int64_t e = 0; e < size; ++e) {
    const T key = keys[e] == keys[e] ? keys[e] : T(-INFINITY);
    const T lower = key < first ? key : first;
    first = key < first ? first : key;
    second = second < lower ? lower : second;
  }
  return kTop > 1 && size > 1 ? first + second : first;
}

// The logits of the choices; -inf, whose score is 0, for those that are not valid.
template <class Row, class T = typename Row::Scalar>
MOE_HOST_DEVICE void gather_choices(const T* z, int64_t E, const int64_t* ids, int64_t K, T* y) {
  Row::once([&] {
    for (int64_t k = 0; k < K; ++k) y[k] = is_valid(ids[k], E) ? z[ids[k]] : T(-INFINITY);
  });
}

// y_k = softmax of z over the valid choices, 0 elsewhere (all zeros if none is valid). Taken from
// the logits, not from the probabilities, which can all underflow when a bias or groups choose.
template <class Row, class T = typename Row::Scalar>
MOE_HOST_DEVICE void softmax_of_choices(
    const T* z, int64_t E, const int64_t* ids, int64_t K, T* y) {
  if (K == 0) return;
  gather_choices<Row>(z, E, ids, K, y);
  softmax<Row>(y, K, y);
  Row::once([&] {
    for (int64_t k = 0; k < K; ++k) {
      if (!is_valid(ids[k], E)) y[k] = 0;
    }
  });
}

struct Softmax {
  template <class Row, class T = typename Row::Scalar>
  static MOE_HOST_DEVICE void probs(const T* z, int64_t E, T* P) {
    softmax<Row>(z, E, P);
  }

  template <class Row, class T = typename Row::Scalar>
  static MOE_HOST_DEVICE void keys(const T* z, int64_t E, T* keys) {
    softmax<Row>(z, E, keys);
  }

  // DeepSeek-V2 ranks a group by its best expert.
  static constexpr int kGroupTop = 1;

  template <class Row, class T = typename Row::Scalar>
  static MOE_HOST_DEVICE void weights(
      const T* z, const T* P, int64_t E, const int64_t* ids, int64_t K, bool renormalize, T c,
      T* w) {
    if (renormalize) {
      softmax_of_choices<Row>(z, E, ids, K, w);
    } else {
      Row::once([&] {
        for (int64_t k = 0; k < K; ++k) w[k] = is_valid(ids[k], E) ? P[ids[k]] : T(0);
      });
    }
    Row::each(K, [&](auto at) { at.set(w, at(w) * typename Row::V(c)); });
  }

  // dz [E] is written. ds [K] and dP [E] may be null: no gradient. work holds E + K numbers.
  template <class Row, class T = typename Row::Scalar>
  static MOE_HOST_DEVICE void backward(
      const T* z, int64_t E, const int64_t* ids, int64_t K, bool renormalize, T c, const T* ds,
      const T* dP, T* dz, T* work) {
    using V = typename Row::V;
    T* p = work;
    T* y = work + E;
    softmax<Row>(z, E, p);
    // Everything that reaches z through the full softmax has one form, p (q - <p, q>).
    Row::each(E, [&](auto at) { at.set(dz, dP ? at(dP) : V(0)); });
    if (ds && !renormalize) {
      Row::once([&] {
        for (int64_t k = 0; k < K; ++k) {
          if (is_valid(ids[k], E)) dz[ids[k]] += c * ds[k];
        }
      });
    }
    const V dot(Row::sum(E, [&](auto at) { return at(p) * at(dz); }));
    Row::each(E, [&](auto at) { at.set(dz, at(p) * (at(dz) - dot)); });
    if (ds && renormalize) {
      softmax_of_choices<Row>(z, E, ids, K, y);
      T mean = 0;
      for (int64_t k = 0; k < K; ++k) mean += is_valid(ids[k], E) ? y[k] * ds[k] : T(0);
      Row::once([&] {
        for (int64_t k = 0; k < K; ++k) {
          if (is_valid(ids[k], E)) dz[ids[k]] += c * y[k] * (ds[k] - mean);
        }
      });
    }
  }
};

struct Sigmoid {
  template <class Row, class T = typename Row::Scalar>
  static MOE_HOST_DEVICE void probs(const T* z, int64_t E, T* P) {
    const typename Row::V sum(Row::sum(E, [&](auto at) {
      const auto y = sigmoid(at(z));
      at.set(P, y);
      return y;
    }));
    Row::each(E, [&](auto at) { at.set(P, at(P) / sum); });
  }

  template <class Row, class T = typename Row::Scalar>
  static MOE_HOST_DEVICE void keys(const T* z, int64_t E, T* keys) {
    Row::each(E, [&](auto at) { at.set(keys, sigmoid(at(z))); });
  }

  // DeepSeek-V3 ranks a group by the sum of its best two experts.
  static constexpr int kGroupTop = 2;

  template <class Row, class T = typename Row::Scalar>
  static MOE_HOST_DEVICE void weights(
      const T* z, const T*, int64_t E, const int64_t* ids, int64_t K, bool renormalize, T c, T* w) {
    const T sum = scores_of_choices<Row>(z, E, ids, K, w);
    const T scale = renormalize ? c / (sum + T(kEps)) : c;
    Row::each(K, [&](auto at) { at.set(w, at(w) * typename Row::V(scale)); });
  }

  template <class Row, class T = typename Row::Scalar>
  static MOE_HOST_DEVICE void backward(
      const T* z, int64_t E, const int64_t* ids, int64_t K, bool renormalize, T c, const T* ds,
      const T* dP, T* dz, T* work) {
    using V = typename Row::V;
    if (dP) {
      const V sum(Row::sum(E, [&](auto at) { return sigmoid(at(z)); }));
      const V mean = V(Row::sum(E, [&](auto at) { return sigmoid(at(z)) * at(dP); })) / sum;
      Row::each(E, [&](auto at) {
        const V y = sigmoid(at(z));
        at.set(dz, y * (V(1) - y) / sum * (at(dP) - mean));
      });
    } else {
      Row::each(E, [&](auto at) { at.set(dz, V(0)); });
    }
    if (!ds) return;
    T* y = work + E;
    const T sum = scores_of_choices<Row>(z, E, ids, K, y);
    T scale = c, mean = 0;
    if (renormalize) {
      scale = c / (sum + T(kEps));
      mean = Row::sum(K, [&](auto at) { return at(y) * at(ds); }) / (sum + T(kEps));
    }
    Row::once([&] {
      for (int64_t k = 0; k < K; ++k) {
        if (is_valid(ids[k], E)) dz[ids[k]] += scale * (ds[k] - mean) * (y[k] * (T(1) - y[k]));
      }
    });
  }

 private:
  static constexpr double kEps = 1e-20;
  // Returns their sum.
  template <class Row, class T = typename Row::Scalar>
  static MOE_HOST_DEVICE T
  scores_of_choices(const T* z, int64_t E, const int64_t* ids, int64_t K, T* y) {
    gather_choices<Row>(z, E, ids, K, y);
    return Row::sum(K, [&](auto at) {
      const auto s = sigmoid(at(y));
      at.set(y, s);
      return s;
    });
  }
};

// Calls fn with the score function's struct.
template <class Fn>
MOE_HOST_DEVICE void dispatch_score_function(ScoreFunction score_function, const Fn& fn) {
  switch (score_function) {
    case ScoreFunction::kSoftmax:
      return fn(Softmax{});
    case ScoreFunction::kSigmoid:
      return fn(Sigmoid{});
  }
}

}  // namespace moe_ext
