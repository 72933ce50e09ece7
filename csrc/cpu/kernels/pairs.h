// Choosing and weighing pairs (token, expert): plain C++, the same for every instruction set.
#pragma once

#include "cpu/kernels/select.h"

namespace moe_ext::cpu::kernels {

// Experts whose probabilities share a cache line.
template <class T>
constexpr int64_t kExpertsPerLine = 64 / sizeof(T);

// tokens[e] = the counts[e] tokens with the largest probs[:, e] among those that may go there, for
// the experts [first, last) of a line: one pass over the rows for all of them.
template <class T, class Allowed>
void best_tokens(
    const T* probs, int64_t num_tokens, int64_t E, const std::vector<int64_t>& counts,
    const Allowed& allowed, int64_t first, int64_t last,
    std::vector<std::vector<int64_t>>& tokens) {
  const int64_t size = last - first;
  std::vector<Best<T>> best;
  for (int64_t i = 0; i < size; ++i) best.emplace_back(counts[first + i]);
  // Most keys are no better than what is there: one comparison with a threshold, beside its
  // neighbours'. NaN is compared so that it passes, which costs time only.
  T threshold[kExpertsPerLine<T>];
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

// Whether a token with these ids [K] is routed, but not to expert e.
inline bool is_routed_elsewhere(const int64_t* ids, int64_t K, int64_t E, int64_t e) {
  bool routed = false;
  for (int64_t k = 0; k < K; ++k) {
    if (ids[k] == e) return false;
    routed = routed || is_valid(ids[k], E);
  }
  return routed;
}

// A list of pairs of fixed size, filled in order; what is left at its end is unused.
struct PairWriter {
  int64_t *tokens, *experts, *slots;  // slots may be null
  int64_t size;
  int64_t used = 0;  // more than size if not all fitted

  void write(int64_t token, int64_t expert, int64_t slot) {
    if (used < size) {
      tokens[used] = token;
      experts[used] = expert;
      if (slots) slots[used] = slot;
    }
    ++used;
  }
  void finish() {
    for (int64_t p = used; p < size; ++p) {
      tokens[p] = experts[p] = -1;
      if (slots) slots[p] = -1;
    }
  }
};

// The pairs of expert e in the order of their tokens: of its chosen slots, which are kept, and of
// the tokens that it is padded with, who have none.
inline void write_rounded(
    int64_t e, int64_t K, const std::vector<int64_t>& chosen_slots,
    const std::vector<int64_t>& padded_tokens, PairWriter& pairs, int64_t* kept) {
  auto slot = chosen_slots.begin();
  auto token = padded_tokens.begin();
  while (slot != chosen_slots.end() || token != padded_tokens.end()) {
    if (token == padded_tokens.end() || (slot != chosen_slots.end() && *slot / K < *token)) {
      kept[*slot] = e;
      pairs.write(*slot / K, e, *slot);
      ++slot;
    } else {
      pairs.write(*token++, e, -1);
    }
  }
}

template <class T>
void pair_weights(
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
void pair_weights_backward(
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

}  // namespace moe_ext::cpu::kernels
