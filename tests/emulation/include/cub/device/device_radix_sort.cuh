// What CUB does is taken for granted.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace cub {
struct DeviceRadixSort {
  template <class Key, class Value>
  static void SortPairs(
      void* workspace, size_t& bytes, const Key* keys, Key* sorted_keys, const Value* values,
      Value* sorted_values, int count, int, int end_bit, cudaStream_t = nullptr) {
    bytes = 1;
    if (!workspace) return;
    std::vector<int> order(count);
    for (int i = 0; i < count; ++i) order[i] = i;
    const uint64_t bits = end_bit < 64 ? (uint64_t(1) << end_bit) - 1 : ~uint64_t(0);
    const auto key = [&](int i) { return keys[i] & bits; };
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return key(a) < key(b); });
    for (int i = 0; i < count; ++i) {
      sorted_keys[i] = keys[order[i]];
      sorted_values[i] = values[order[i]];
    }
  }
};
}  // namespace cub
