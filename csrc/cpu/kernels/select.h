// The best of a stream, without sorting it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "common/score_function.h"  // is_valid

namespace moe_ext::cpu::kernels {

// Keeps the `count` largest of the keys pushed, in any number; ties go to the earlier one. NaN
// counts as -infinity. Indices must ascend.
template <class T>
class Best {
 public:
  explicit Best(int64_t count)
      : count_(count), full_(count == 0), threshold_(full_ ? kHighest : -kHighest) {}

  // A push of a key at or below this one changes nothing, but for one of -infinity before `count`
  // keys are there.
  T threshold() const { return threshold_; }

  void push(T key, int64_t index) {
    if (key != key) key = -kHighest;
    if (full_ && !(key > threshold_)) return;
    items_.push_back({key, index});
    if (static_cast<int64_t>(items_.size()) >= 2 * count_ + kSlack) shrink();
  }

  // The kept indices, ascending.
  std::vector<int64_t> take() {
    if (static_cast<int64_t>(items_.size()) > count_) shrink();
    std::vector<int64_t> indices;
    indices.reserve(items_.size());
    for (const Item& item : items_) indices.push_back(item.index);
    std::sort(indices.begin(), indices.end());
    items_.clear();
    return indices;
  }

 private:
  static constexpr int64_t kSlack = 64;  // so that few keys are not partitioned again and again
  static constexpr T kHighest = std::numeric_limits<T>::infinity();

  struct Item {
    T key;
    int64_t index;
    bool operator<(const Item& other) const {  // the better one first
      return key > other.key || (key == other.key && index < other.index);
    }
  };

  void shrink() {
    std::nth_element(items_.begin(), items_.begin() + count_ - 1, items_.end());
    items_.resize(count_);
    threshold_ = items_.back().key;
    full_ = true;
  }

  int64_t count_;
  bool full_;
  T threshold_;
  std::vector<Item> items_;
};

// The slots of topk_ids [T, K] by expert, ascending; skipped ones in none.
struct SlotsByExpert {
  std::vector<int64_t> offsets;  // [E + 1]
  std::vector<int64_t> slots;

  SlotsByExpert(const int64_t* ids, int64_t num_slots, int64_t E) : offsets(E + 1, 0) {
    for (int64_t s = 0; s < num_slots; ++s) {
      if (is_valid(ids[s], E)) ++offsets[ids[s] + 1];
    }
    for (int64_t e = 0; e < E; ++e) offsets[e + 1] += offsets[e];
    slots.resize(offsets[E]);
    std::vector<int64_t> next(offsets.begin(), offsets.end() - 1);
    for (int64_t s = 0; s < num_slots; ++s) {
      if (is_valid(ids[s], E)) slots[next[ids[s]]++] = s;
    }
  }

  int64_t count(int64_t e) const { return offsets[e + 1] - offsets[e]; }

  // The `count` slots of expert e with the largest keys, ascending.
  template <class T>
  std::vector<int64_t> best(int64_t e, const T* keys, int64_t count) const {
    const auto begin = slots.begin() + offsets[e], end = slots.begin() + offsets[e + 1];
    if (count >= end - begin) return {begin, end};
    Best<T> best(count);
    for (auto slot = begin; slot != end; ++slot) best.push(keys[*slot], *slot);
    return best.take();
  }
};

// Tokens with at least one valid id.
inline int64_t count_routed_tokens(const int64_t* ids, int64_t T, int64_t K, int64_t E) {
  int64_t tokens = 0;
  for (int64_t t = 0; t < T; ++t) {
    tokens +=
        std::any_of(ids + t * K, ids + (t + 1) * K, [E](int64_t id) { return is_valid(id, E); });
  }
  return tokens;
}

}  // namespace moe_ext::cpu::kernels
