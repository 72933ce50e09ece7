// Choosing experts, their weights and the losses, of one instruction set.
#pragma once

#include "cpu/kernels/scratch.h"
#include "cpu/kernels/simd/convert.h"
#include "cpu/kernels/simd/math.h"
#include "cpu/kernels/simd/shuffle.h"

namespace moe_ext::cpu::kernels {
namespace {

// Walks a row of numbers by vectors, as common/score_function.h asks.
template <class T>
struct VecRow {
  using Scalar = T;
  using V = Vec<T>;
  static constexpr int64_t kLanes = V::kLanes;

  struct At {
    int64_t first, left;
    MOE_INLINE V operator()(const T* p) const { return load<V>(p + first, left); }
    MOE_INLINE void set(T* p, V v) const { store(p + first, v, left); }
  };

  template <class Fn>
  static MOE_INLINE void each(int64_t n, const Fn& fn) {
    for (int64_t i = 0; i < n; i += kLanes) fn(At{i, n - i});
  }

  template <class Fn>
  static MOE_INLINE void once(const Fn& fn) {
    fn();
  }

  template <class Fn>
  static MOE_INLINE T sum(int64_t n, const Fn& fn) {
    V total(0);
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) total = total + fn(At{i, kLanes});
    if (i < n) total = total + select(lanes_below<T>(n - i), fn(At{i, n - i}), V(0));
    return kernels::sum(total);
  }

  static MOE_INLINE T max_or_nan(const T* z, int64_t n) {
    const auto larger_or_nan = [](auto a, auto b) { return select((b > a) | is_nan(b), b, a); };
    V top(z[0]);
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) top = larger_or_nan(top, load<V>(z + i));
    if (i < n) {
      top = larger_or_nan(top, select(lanes_below<T>(n - i), load<V>(z + i, n - i), V(z[0])));
    }
    return fold(top, larger_or_nan);
  }
};

template <class T>
struct Router {
  using R = VecRow<T>;
  using V = Vec<T>;
  static constexpr int64_t kLanes = V::kLanes;

  // The order of a choice: larger first, NaN last. Scans go by ascending id and need a strictly
  // better key to overtake, so that ties stay with the lower id.
  static MOE_INLINE bool is_better(T a, T b) { return a > b || (a == a && b != b); }

  // Keeps the `limit` best of what is offered, best first.
  struct BestList {
    int64_t limit;
    T* keys;
    int64_t* ids;
    int64_t count = 0;

    MOE_INLINE void offer(T key, int64_t id) {
      int64_t at = count;
      if (count < limit) {
        ++count;
      } else if (!is_better(key, keys[--at])) {
        return;
      }
      for (; at > 0 && is_better(key, keys[at - 1]); --at) {
        keys[at] = keys[at - 1];
        ids[at] = ids[at - 1];
      }
      keys[at] = key;
      ids[at] = id;
    }

    // Offers keys[begin, end); only those that beat the last in the list are looked at one by one.
    void offer_all(const T* offered, int64_t begin, int64_t end) {
      int64_t e = begin;
      for (; e < end && count < limit; ++e) offer(offered[e], e);
      for (; e + kLanes <= end; e += kLanes) {
        const V key = load<V>(offered + e);
        const V last(keys[limit - 1]);
        for (uint64_t better = lane_bits((key > last) | (is_nan(last) & ~is_nan(key))); better;
             better &= better - 1) {
          const int64_t id = e + __builtin_ctzll(better);
          offer(offered[id], id);
        }
      }
      for (; e < end; ++e) offer(offered[e], e);
    }
  };

  static int64_t scratch_bytes(int64_t E, int64_t K) {
    return Scratch::bytes<T>(E + K) + 2 * Scratch::bytes<T>(E) + Scratch::bytes<int64_t>(E) +
           Scratch::bytes<bool>(E);
  }

  static void choose(
      const RouterArgs& args, const ChoiceArgs& choice, int64_t begin, int64_t end, int64_t* ids,
      void* scratch_buffer) {
    const int64_t E = args.E, groups = choice.num_groups, size = E / groups;
    const T* bias = static_cast<const T*>(choice.bias);
    Scratch scratch(scratch_buffer);
    T* best_keys = scratch.take<T>(E + args.K);
    T* score_keys = scratch.take<T>(E);
    T* group_keys = scratch.take<T>(E);
    int64_t* group_ids = scratch.take<int64_t>(E);
    bool* in_use = scratch.take<bool>(E);
    dispatch_score_function(args.score_function, [&](auto score) {
      using Score = decltype(score);
      for (int64_t t = begin; t < end; ++t) {
        const T* keys = static_cast<const T*>(args.logits) + t * E;
        if (bias || groups > 1) {
          Score::template keys<R>(keys, E, score_keys);
          if (bias) R::each(E, [&](auto at) { at.set(score_keys, at(score_keys) + at(bias)); });
          keys = score_keys;
        }
        BestList best{args.K, best_keys, ids + t * args.K};
        if (choice.topk_groups == groups) {
          best.offer_all(keys, 0, E);
          continue;
        }
        BestList best_groups{choice.topk_groups, group_keys, group_ids};
        for (int64_t g = 0; g < groups; ++g) {
          best_groups.offer(group_score<Score::kGroupTop>(keys + g * size, size), g);
          in_use[g] = false;
        }
        for (int64_t i = 0; i < best_groups.count; ++i) in_use[group_ids[i]] = true;
        for (int64_t g = 0; g < groups; ++g) {
          if (in_use[g]) best.offer_all(keys, g * size, (g + 1) * size);
        }
      }
    });
  }

  static void weights(
      const RouterArgs& args, const int64_t* ids, int64_t begin, int64_t end, void* weights,
      void* probs) {
    const int64_t E = args.E, K = args.K;
    dispatch_score_function(args.score_function, [&](auto score) {
      using Score = decltype(score);
      for (int64_t t = begin; t < end; ++t) {
        const T* z = static_cast<const T*>(args.logits) + t * E;
        const int64_t* chosen = ids + t * K;
        T* P = static_cast<T*>(probs) + t * E;
        T* w = static_cast<T*>(weights) + t * K;
        Score::template probs<R>(z, E, P);
        Score::template weights<R>(
            z, P, E, chosen, K, args.renormalize, static_cast<T>(args.scaling_factor), w);
        const T top = R::max_or_nan(z, E);
        if (top == top) continue;
        for (int64_t k = 0; k < K; ++k) {
          if (is_valid(chosen[k], E)) w[k] = top;
        }
      }
    });
  }

  static void backward(
      const RouterArgs& args, const int64_t* ids, const void* grad_weights, const void* grad_probs,
      int64_t begin, int64_t end, void* grad_logits, void* scratch_buffer) {
    const int64_t E = args.E, K = args.K;
    T* work = Scratch(scratch_buffer).take<T>(E + K);
    const auto row = [](const void* data, int64_t at) {
      return data ? static_cast<const T*>(data) + at : nullptr;
    };
    dispatch_score_function(args.score_function, [&](auto score) {
      using Score = decltype(score);
      for (int64_t t = begin; t < end; ++t) {
        Score::template backward<R>(
            row(args.logits, t * E), E, ids + t * K, K, args.renormalize,
            static_cast<T>(args.scaling_factor), row(grad_weights, t * K), row(grad_probs, t * E),
            static_cast<T*>(grad_logits) + t * E, work);
      }
    });
  }

  static double sum_dots(
      const void* rows, const void* row, int64_t E, const bool* mask, int64_t begin, int64_t end) {
    const T* factor = static_cast<const T*>(row);
    double total = 0;
    for (int64_t t = begin; t < end; ++t) {
      if (mask && !mask[t]) continue;
      const T* p = static_cast<const T*>(rows) + t * E;
      total += R::sum(E, [&](auto at) { return at(p) * at(factor); });
    }
    return total;
  }

  static double z_loss(
      const void* logits, int64_t E, const bool* mask, int64_t begin, int64_t end, void* scratch) {
    T* p = static_cast<T*>(scratch);
    double total = 0;
    for (int64_t t = begin; t < end; ++t) {
      if (mask && !mask[t]) continue;
      const double lse = log_sum_exp<R>(exp_row<R>(static_cast<const T*>(logits) + t * E, E, p));
      total += lse * lse;
    }
    return total;
  }

  // d lse^2 / dz = 2 lse softmax(z).
  static void z_loss_backward(
      const void* logits, int64_t E, const bool* mask, double scale, int64_t begin, int64_t end,
      void* grad_logits) {
    for (int64_t t = begin; t < end; ++t) {
      const T* z = static_cast<const T*>(logits) + t * E;
      T* dz = static_cast<T*>(grad_logits) + t * E;
      if (mask && !mask[t]) {
        __builtin_memset(dz, 0, E * sizeof(T));
        continue;
      }
      const ExpSum<T> row = exp_row<R>(z, E, dz);
      const V factor(2 * scale * static_cast<double>(log_sum_exp<R>(row)) / row.sum);
      R::each(E, [&](auto at) { at.set(dz, at(dz) * factor); });
    }
  }

  static constexpr RouterKernels table() {
    return {scratch_bytes, choose, weights, backward, sum_dots, z_loss, z_loss_backward};
  }
};

}  // namespace
}  // namespace moe_ext::cpu::kernels
