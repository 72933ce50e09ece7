// Which slots stay where experts have a capacity: plain C++, the same for every instruction set.
// kept [T, K] begins as -1.
#pragma once

#include "cpu/kernels/select.h"

namespace moe_ext::cpu::kernels {

// Those with the highest weights, of the experts [begin, end).
template <class T>
void keep_highest_weights(
    const T* weights, const SlotsByExpert& slots, int64_t capacity, int64_t begin, int64_t end,
    int64_t* kept) {
  for (int64_t e = begin; e < end; ++e) {
    for (const int64_t slot : slots.best(e, weights, capacity)) kept[slot] = e;
  }
}

// The earliest, all first choices before all second ones.
inline void keep_earliest(
    const int64_t* ids, int64_t T, int64_t K, int64_t E, int64_t capacity, int64_t* kept) {
  std::vector<int64_t> used(E, 0);
  for (int64_t k = 0; k < K; ++k) {
    for (int64_t slot = k; slot < T * K; slot += K) {
      const int64_t e = ids[slot];
      if (is_valid(e, E) && used[e] < capacity) {
        kept[slot] = e;
        ++used[e];
      }
    }
  }
}

}  // namespace moe_ext::cpu::kernels
