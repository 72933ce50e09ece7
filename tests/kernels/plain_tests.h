// The tests of the CPU's kernels that are plain C++, the same for every instruction set: plans,
// choices, counts.
#pragma once

#include <memory>

#include "common/token_rounding.h"
#include "cpu/kernels/aux_loss.h"
#include "cpu/kernels/capacity.h"
#include "cpu/kernels/pairs.h"
#include "cpu/kernels/plan.h"
#include "shared_tests.h"

namespace plain_tests {

using namespace moe_ext::cpu::kernels;
using harness::describe;
using harness::expect;

// The choices of capacity, token rounding and expert choice, against sorts.
inline void test_selection(int64_t num_slots, int64_t E, int64_t M, std::mt19937& random) {
  const auto fail = [&](const char* what) {
    expect(false, describe("selection", "slots", num_slots, "E", E) + ": " + what);
  };
  std::vector<int64_t> ids(num_slots);
  std::vector<float> keys(num_slots);
  for (int64_t s = 0; s < num_slots; ++s) {
    ids[s] = static_cast<int64_t>(random() % (E + 2)) - 1;
    keys[s] = random() % 9 == 0 ? NAN : static_cast<float>(random() % 5);  // many ties
  }
  const SlotsByExpert slots(ids.data(), num_slots, E);
  std::vector<int64_t> counts(E);
  for (int64_t e = 0; e < E; ++e) {
    std::vector<int64_t> expected;
    for (int64_t s = 0; s < num_slots; ++s) {
      if (ids[s] == e) expected.push_back(s);
    }
    counts[e] = slots.count(e);
    if (counts[e] != static_cast<int64_t>(expected.size())) fail("count");
    for (const int64_t kept : {int64_t{0}, int64_t{1}, counts[e] / 2, counts[e] + 1}) {
      if (slots.best(e, keys.data(), kept) != oracle::best(expected, keys.data(), kept)) {
        fail("best");
      }
    }
  }
  using moe_ext::Rounding;
  std::vector<double> noise(E, 0.5);
  std::vector<int64_t> rounded(E);
  for (const Rounding rounding :
       {Rounding::kNearest, Rounding::kUp, Rounding::kDown, Rounding::kStochastic,
        Rounding::kBalanced}) {
    for (int64_t e = 0; e < E; ++e) {
      rounded[e] =
          moe_ext::round_count(counts.data(), e, E, M, num_slots / 2, rounding, noise.data());
      if (rounded[e] % M != 0 || rounded[e] > num_slots / 2) fail("rounding");
      if (counts[e] <= num_slots / 2 / M * M && std::abs(rounded[e] - counts[e]) >= M) {
        fail("rounding too far");
      }
    }
  }
}

// The plan of slots and of pairs, forth and back, against the oracle's; and what is wrong with
// others.
inline void test_plan(
    int64_t T, int64_t K, int64_t E, shared_tests::IdKind kind, std::mt19937& random) {
  const int64_t N = T * K, H = 3;
  const std::string name = describe("plan", "T", T, "K", K, "E", E, "kind", int{kind});
  const std::vector<int64_t> ids = shared_tests::make_ids(N, E, kind, random);
  const oracle::Plan expected = oracle::plan(ids, K, E);
  std::vector<int32_t> row_map(N), offsets(E + 1), slot_of_row(N);
  make_plan(ids.data(), nullptr, N, E, row_map.data(), offsets.data(), slot_of_row.data());
  const int64_t used = offsets[E];
  slot_of_row.resize(used);
  expect(row_map == expected.row_map, name + ": row_map");
  // From narrow ids, in the order of the slots that is said, and without the inverse.
  const std::vector<int32_t> narrow(ids.begin(), ids.end());
  std::vector<int32_t> order(N), same_map(N), same_offsets(E + 1);
  for (int64_t slot = 0; slot < N; ++slot) order[slot] = static_cast<int32_t>(slot);
  make_plan(narrow.data(), order.data(), N, E, same_map.data(), same_offsets.data(), nullptr);
  expect(same_map == row_map && same_offsets == offsets, name + ": in a given order");
  std::reverse(order.begin(), order.end());
  make_plan(narrow.data(), order.data(), N, E, same_map.data(), same_offsets.data(), nullptr);
  for (int64_t slot = 0; slot < N; ++slot) {
    const int64_t e = ids[slot];
    const bool has_row = row_map[slot] >= 0;
    const int64_t mirrored = has_row ? offsets[e] + offsets[e + 1] - 1 - row_map[slot] : -1;
    expect(same_map[slot] == mirrored, name + ": in the order turned round");
  }
  for (int64_t r = 0; r < used; ++r) {
    expect(row_map[slot_of_row[r]] == r, name + ": slot_of_row");
  }
  std::vector<int32_t> inverse(N, -1);
  const auto take = [&](int32_t slot, int32_t row) {
    return std::exchange(inverse[row], slot) == -1;
  };
  const auto invert = [&] {
    std::fill(inverse.begin(), inverse.end(), -1);
    return for_slots(row_map.data(), N, N, take);
  };
  expect(invert().fault == RowMapFault::kNone, name + ": its own row_map");
  expect(std::equal(slot_of_row.begin(), slot_of_row.end(), inverse.begin()), name + ": inverse");

  std::vector<char> tokens(T * H), permuted(N * H, 'x');
  for (char& byte : tokens) byte = static_cast<char>(random() % 26 + 'a');
  gather_rows(tokens.data(), row_map.data(), K, H, 0, T, permuted.data());
  for (int64_t r = 0; r < used; ++r) {
    const char* token = tokens.data() + slot_of_row[r] / K * H;
    expect(std::equal(token, token + H, permuted.data() + r * H), name + ": gathered");
  }

  if (used > 1) {
    const int64_t first = slot_of_row[0], second = slot_of_row[1];
    row_map[second] = 0;
    const RowMapCheck twice = invert();
    expect(twice.fault == RowMapFault::kTwice && twice.row == 0, name + ": a row twice");
    for (const int64_t outside : {int64_t{-2}, N}) {
      row_map[first] = static_cast<int32_t>(outside);
      const RowMapCheck check = invert();
      expect(
          check.fault == RowMapFault::kOutside && check.row == outside, name + ": a row outside");
    }
  }
  std::vector<int32_t> bad(ids.begin(), ids.end());
  expect(find_bad_id(bad.data(), N) == N, name + ": no bad id");
  if (N > 0) bad[N / 2] = -2;
  expect(find_bad_id(bad.data(), N) == (N > 0 ? N / 2 : 0), name + ": a bad id");
}

// Pairs in the order of their tokens, the unused ones last.
inline void test_order_by_token(int64_t P, int64_t T, std::mt19937& random) {
  std::vector<int64_t> tokens(P);
  for (int64_t& token : tokens) token = static_cast<int64_t>(random() % (T + 1)) - 1;
  std::vector<int32_t> expected(P);
  for (int64_t p = 0; p < P; ++p) expected[p] = static_cast<int32_t>(p);
  std::stable_sort(expected.begin(), expected.end(), [&](int32_t a, int32_t b) {
    return (tokens[a] < 0 ? T : tokens[a]) < (tokens[b] < 0 ? T : tokens[b]);
  });
  expect(
      order_by_token(tokens.data(), P, T) == expected, describe("order_by_token", "P", P, "T", T));
}

// The best tokens of all experts, line by line; the list that a rounding writes; capacity.
inline void test_pairs(int64_t T, int64_t K, int64_t E, std::mt19937& random) {
  const std::string name = describe("pairs", "T", T, "K", K, "E", E);
  const std::vector<int64_t> ids =
      shared_tests::make_ids(T * K, E, shared_tests::kSomeSkipped, random);
  std::vector<float> probs(T * E);
  for (float& p : probs) p = random() % 9 == 0 ? NAN : static_cast<float>(random() % 7);
  std::vector<int64_t> counts(E);
  for (int64_t& count : counts) count = static_cast<int64_t>(random() % (T + 1));
  const auto allowed = [&](int64_t t, int64_t e) {
    return is_routed_elsewhere(ids.data() + t * K, K, E, e);
  };
  std::vector<std::vector<int64_t>> tokens(E);
  for (int64_t first = 0; first < E; first += kExpertsPerLine<float>) {
    best_tokens(
        probs.data(), T, E, counts, allowed, first, std::min(first + kExpertsPerLine<float>, E),
        tokens);
  }
  const SlotsByExpert slots(ids.data(), T * K, E);
  std::vector<float> weights(T * K);
  for (float& weight : weights) weight = static_cast<float>(random() % 5);
  int64_t size = 0;
  for (int64_t e = 0; e < E; ++e) {
    std::vector<int64_t> may_go;
    std::vector<float> keys(T);
    for (int64_t t = 0; t < T; ++t) {
      keys[t] = probs[t * E + e];
      bool here = false, somewhere = false;
      for (int64_t k = 0; k < K; ++k) {
        here = here || ids[t * K + k] == e;
        somewhere = somewhere || (ids[t * K + k] >= 0 && ids[t * K + k] < E);
      }
      if (somewhere && !here) may_go.push_back(t);
    }
    expect(tokens[e] == oracle::best(may_go, keys.data(), counts[e]), name + ": best tokens");
    size += static_cast<int64_t>(tokens[e].size()) + slots.count(e);
  }

  std::vector<int64_t> kept(T * K, -1);
  for (const int64_t room : {size, size + 3, size / 2}) {
    std::vector<int64_t> pair_tokens(room), pair_experts(room), pair_slots(room);
    PairWriter pairs{pair_tokens.data(), pair_experts.data(), pair_slots.data(), room};
    std::vector<int64_t> same_tokens(room), same_experts(room);
    PairWriter without_slots{same_tokens.data(), same_experts.data(), nullptr, room};
    for (int64_t e = 0; e < E; ++e) {
      const auto chosen = slots.best(e, weights.data(), T * K);
      write_rounded(e, K, chosen, tokens[e], pairs, kept.data());
      write_rounded(e, K, chosen, tokens[e], without_slots, kept.data());
    }
    pairs.finish();
    without_slots.finish();
    expect(same_tokens == pair_tokens && same_experts == pair_experts, name + ": without slots");
    expect(pairs.used == size, name + ": as many pairs as there are");
    for (int64_t p = 0; p < room; ++p) {
      const bool used = p < size;
      expect((pair_tokens[p] >= 0) == used, name + ": the used pairs come first");
      if (pair_slots[p] >= 0) {
        expect(ids[pair_slots[p]] == pair_experts[p], name + ": a slot's expert");
        expect(pair_slots[p] / K == pair_tokens[p], name + ": a slot's token");
      }
      const bool ordered = p == 0 || !used || pair_experts[p] != pair_experts[p - 1] ||
                           pair_tokens[p] >= pair_tokens[p - 1];
      expect(ordered, name + ": in the order of the tokens");
    }
  }
  for (int64_t slot = 0; slot < T * K; ++slot) {
    const int64_t expected = ids[slot] >= 0 && ids[slot] < E ? ids[slot] : -1;
    expect(kept[slot] == expected, name + ": kept");
  }

  for (const int64_t capacity : {int64_t{0}, int64_t{2}, T * K}) {
    std::vector<int64_t> highest(T * K, -1), earliest(T * K, -1), used(E, 0);
    keep_highest_weights(weights.data(), slots, capacity, 0, E, highest.data());
    keep_earliest(ids.data(), T, K, E, capacity, earliest.data());
    for (int64_t e = 0; e < E; ++e) {
      std::vector<int64_t> of_expert, kept_here;
      for (int64_t slot = 0; slot < T * K; ++slot) {
        if (ids[slot] == e) of_expert.push_back(slot);
        if (highest[slot] == e) kept_here.push_back(slot);
      }
      expect(
          kept_here == oracle::best(of_expert, weights.data(), capacity),
          name + ": capacity by weight");
      const int64_t fits = std::min(capacity, slots.count(e));
      expect(std::count(earliest.begin(), earliest.end(), e) == fits, name + ": capacity by place");
    }
    for (int64_t k = 0; k < K; ++k) {
      for (int64_t slot = k; slot < T * K; slot += K) {
        const int64_t e = ids[slot];
        if (e < 0 || e >= E) continue;
        expect((earliest[slot] == e) == (used[e]++ < capacity), name + ": the earliest stay");
      }
    }
  }
}

// Weights of pairs that have a slot, of those that have none and of unused ones; and their
// gradients.
inline void test_pair_weights(int64_t T, int64_t K, int64_t E, std::mt19937& random) {
  const std::string name = describe("pair weights", "T", T, "K", K, "E", E);
  const int64_t P = T * K + 3 * T;  // every slot, then pairs without one, some of them unused
  std::vector<double> weights(T * K), probs(T * E), grad(P);
  for (auto* numbers : {&weights, &probs, &grad}) {
    for (double& x : *numbers) x = static_cast<double>(random() % 1000 + 1);
  }
  std::vector<int64_t> tokens(P, -1), experts(P, -1), slots(P, -1);
  for (int64_t p = 0; p < P; ++p) {
    const int64_t i = p - T * K;
    if (i >= 2 * T) continue;
    tokens[p] = i < 0 ? p / K : i % T;
    experts[p] = i < 0 ? 0 : i / T % E;
    if (i < 0) slots[p] = p;
    if (i >= T && E < 2) tokens[p] = -1;  // no two pairs have the same token and expert
  }
  constexpr double kScale = 1.5;
  for (const bool with_slots : {false, true}) {
    const int64_t first = with_slots ? 0 : T * K;
    const int64_t* own_slots = with_slots ? slots.data() : nullptr;
    std::vector<double> out(P - first, -7), to_weights(T * K), to_probs(T * E);
    pair_weights(
        weights.data(), probs.data(), tokens.data() + first, experts.data() + first, own_slots,
        P - first, E, kScale, out.data());
    pair_weights_backward(
        grad.data(), tokens.data() + first, experts.data() + first, own_slots, P - first, E, kScale,
        to_weights.data(), to_probs.data());
    std::vector<double> expected_weights(T * K), expected_probs(T * E);
    for (int64_t p = first; p < P; ++p) {
      double expected = 0;
      if (p < T * K) {
        expected = weights[p];
        expected_weights[p] = grad[p - first];
      } else if (tokens[p] >= 0) {
        expected = kScale * probs[tokens[p] * E + experts[p]];
        expected_probs[tokens[p] * E + experts[p]] = kScale * grad[p - first];
      }
      expect(out[p - first] == expected, name + ": weight");
    }
    expect(to_weights == expected_weights, name + ": gradient of weights");
    expect(to_probs == expected_probs, name + ": gradient of probs");
    pair_weights_backward<double>(
        grad.data(), tokens.data() + first, experts.data() + first, own_slots, P - first, E, kScale,
        nullptr, nullptr);
  }
}

// Counts, entropies and a row of gradients over masked tokens.
inline void test_counts(int64_t T, int64_t K, int64_t E, std::mt19937& random) {
  const std::string name = describe("counts", "T", T, "K", K, "E", E);
  std::vector<int64_t> ids = shared_tests::make_ids(T * K, E, shared_tests::kSomeSkipped, random);
  std::vector<double> probs(T * E);
  for (double& p : probs) p = random() % 5 == 0 ? 0 : static_cast<double>(random() % 100 + 1) / 100;
  std::unique_ptr<bool[]> mask(new bool[T]);
  for (int64_t t = 0; t < T; ++t) mask[t] = random() % 3 != 0;
  for (const bool* tokens :
       {static_cast<const bool*>(nullptr), static_cast<const bool*>(mask.get())}) {
    std::vector<int64_t> counts(E), expected(E);
    double entropy = 0;
    int64_t unmasked = 0;
    for (int64_t t = 0; t < T; ++t) {
      if (tokens && !tokens[t]) continue;
      ++unmasked;
      for (int64_t k = 0; k < K; ++k) {
        const int64_t id = ids[t * K + k];
        if (id >= 0 && id < E) ++expected[id];
      }
      for (int64_t e = 0; e < E; ++e) {
        const double p = probs[t * E + e];
        if (p > 0) entropy -= p * std::log(p);
      }
    }
    expect(
        count_choices(ids.data(), tokens, 0, T, K, E, counts.data()) == T * K && counts == expected,
        name + ": choices");
    expect(count_unmasked(tokens, T) == unmasked, name + ": unmasked");
    int64_t routed = 0;
    for (int64_t t = 0; t < T; ++t) {
      const auto valid = [E](int64_t id) { return id >= 0 && id < E; };
      routed += std::any_of(ids.begin() + t * K, ids.begin() + (t + 1) * K, valid);
    }
    expect(count_routed_tokens(ids.data(), T, K, E) == routed, name + ": routed tokens");
    const double found = sum_entropies(probs.data(), E, tokens, 0, T);
    expect(std::fabs(found - entropy) <= 1e-12 * std::fabs(entropy), name + ": entropy");
    std::vector<double> grad(T * E);
    spread_grad_row(0.5, probs.data(), tokens, T, E, 0, T, grad.data());
    for (int64_t i = 0; i < T * E; ++i) {
      const bool counts_here = !tokens || tokens[i / E];
      expect(grad[i] == (counts_here ? 0.5 * probs[i % E] : 0), name + ": spread");
    }
  }
  if (T > 1 && K > 0) {
    ids[K] = -2;
    mask[1] = true;
    std::vector<int64_t> counts(E);
    expect(
        count_choices(ids.data(), mask.get(), 0, T, K, E, counts.data()) == K, name + ": a bad id");
    mask[1] = false;
    expect(
        count_choices(ids.data(), mask.get(), 0, T, K, E, counts.data()) == T * K,
        name + ": a bad id that is masked");
  }
}

inline void test_all(std::mt19937& random) {
  for (const int64_t num_slots : {0, 1, 50, 1000}) {
    for (const int64_t E : {1, 3, 40}) test_selection(num_slots, E, 1 + random() % 16, random);
  }
  for (const int64_t T : {0, 1, 2, 37}) {
    for (const int64_t K : {0, 1, 3}) {
      for (const int64_t E : {1, 5, 40}) {
        for (const auto kind : shared_tests::kIdKinds) test_plan(T, K, E, kind, random);
        test_pairs(T, K, E, random);
        test_pair_weights(T, K, E, random);
        test_counts(T, K, E, random);
      }
    }
    test_order_by_token(3 * T, T + 1, random);
  }
}

}  // namespace plain_tests
