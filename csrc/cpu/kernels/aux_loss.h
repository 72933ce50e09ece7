// Counting choices and the entropy of probabilities: plain C++, the same for every instruction set.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "common/score_function.h"

namespace moe_ext::cpu::kernels {

// counts[e] += the number of ids [T, K] that name e, over the unmasked tokens of [begin, end).
// Stops at the first of them that is below -1 and returns its place; else end * K.
template <class Id>
int64_t count_choices(
    const Id* ids, const bool* mask, int64_t begin, int64_t end, int64_t K, int64_t E,
    int64_t* counts) {
  for (int64_t t = begin; t < end; ++t) {
    if (mask && !mask[t]) continue;
    for (int64_t slot = t * K; slot < (t + 1) * K; ++slot) {
      if (ids[slot] < -1) return slot;
      if (is_valid(ids[slot], E)) ++counts[ids[slot]];
    }
  }
  return end * K;
}

inline int64_t count_unmasked(const bool* mask, int64_t T) {
  return mask ? std::count(mask, mask + T, true) : T;
}

// The sum over the unmasked tokens of [begin, end) of the entropy of their probabilities [T, E].
template <class T>
double sum_entropies(const T* probs, int64_t E, const bool* mask, int64_t begin, int64_t end) {
  double sum = 0;
  for (int64_t t = begin; t < end; ++t) {
    if (mask && !mask[t]) continue;
    T entropy = 0;
    for (int64_t e = 0; e < E; ++e) {
      const T p = probs[t * E + e];
      if (p > 0) entropy -= p * std::log(p);
    }
    sum += entropy;
  }
  return sum;
}

// grad_probs[t] = grad_loss * grad_row of t's sequence of `length` tokens, zeros for masked tokens.
template <class T>
void spread_grad_row(
    T grad_loss, const T* grad_row, const bool* mask, int64_t length, int64_t E, int64_t begin,
    int64_t end, T* grad_probs) {
  for (int64_t t = begin; t < end; ++t) {
    const bool counts = !mask || mask[t];
    const T* from = grad_row + t / length * E;
    for (int64_t e = 0; e < E; ++e) {
      grad_probs[t * E + e] = counts ? grad_loss * from[e] : T(0);
    }
  }
}

}  // namespace moe_ext::cpu::kernels
