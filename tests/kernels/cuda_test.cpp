// The CUDA kernels on the host (tests/emulation), against sums in double: `make test-kernels`. What
// only a GPU can show (that nvcc's code does the same, races between blocks, speed) is not tested
// here.
#include "common/token_rounding.h"
#include "cuda/kernels/kernels.h"
#include "shared_tests.h"

namespace {

using namespace harness;
using namespace moe_ext::cuda::kernels;
using oracle::Numbers;
using shared_tests::IdKind;
using shared_tests::make_ids;

struct Cuda {
  static constexpr bool kWritesSkipped = true;

  static RouterArgs args(Type type, const oracle::Router& r, const void* logits) {
    return {type, r.T, r.E, r.K, r.score, r.renormalize, r.scale, logits};
  }

  static void unpermute(const shared_tests::Unpermuting& u) {
    moe_ext::cuda::kernels::unpermute(
        u.type, u.rows, u.row_map, u.weights, u.T, {u.K, nullptr, nullptr}, {}, u.H, u.out,
        nullptr);
    unpermute_backward(
        u.type, u.grad_out, u.rows, u.row_map, u.weights, u.T, u.K, u.H, u.grad_rows,
        u.grad_weights, nullptr);
  }

  static void choose(
      Type type, const oracle::Router& router, const void* logits, const void* bias, int64_t* ids) {
    expect(router_fits(type, router.E, router.K), "router_fits");
    choose_experts(
        args(type, router, logits), bias, router.groups, router.topk_groups, ids, nullptr);
  }
  static void weigh(
      Type type, const oracle::Router& router, const void* logits, const int64_t* ids,
      void* weights, void* probs) {
    router_weights(args(type, router, logits), ids, weights, probs, nullptr);
  }
  static void router_backward(
      Type type, const oracle::Router& router, const void* logits, const int64_t* ids,
      const void* grad_weights, const void* grad_probs, void* grad) {
    router_weights_backward(
        args(type, router, logits), ids, grad_weights, grad_probs, grad, nullptr);
  }

  static void z_loss(
      Type type, const void* logits, const bool* mask, int64_t T, int64_t E, Buffer& loss) {
    std::vector<char> workspace(loss_workspace(1, E) + 64);
    router_z_loss({type, T, E, mask, workspace.data()}, logits, loss.data(), nullptr);
  }
  static void z_loss_backward(
      Type type, double grad_loss, const void* logits, const bool* mask, int64_t T, int64_t E,
      Buffer& grad) {
    std::vector<char> workspace(loss_workspace(1, E) + 64);
    Buffer scale(type, 1);
    scale.fill(grad_loss);
    router_z_loss_backward(
        {type, T, E, mask, workspace.data()}, scale.data(), logits, grad.data(), nullptr);
  }
};

void test_plan(int64_t N, int64_t E, IdKind kind, std::mt19937& random) {
  const std::string name = describe("plan", "slots", N, "kind", int{kind});
  const std::vector<int64_t> ids = make_ids(N, E, kind, random);
  const oracle::Plan expected = oracle::plan(ids, 1, E);
  const int64_t used = expected.groups.used();
  const auto same_rows = [&](const std::vector<int32_t>& slot_of_row) {
    return std::equal(
        slot_of_row.begin(), slot_of_row.begin() + used, expected.slot_of_row.begin());
  };
  std::vector<char> workspace(plan_workspace(N, E));
  std::vector<int32_t> row_map(N, -7), slot_of_row(N, -7), offsets(E + 1, -7), inverse(N, -7);
  make_plan(
      IdType::kI64, ids.data(), nullptr, N, E, row_map.data(), offsets.data(), slot_of_row.data(),
      workspace.data(), nullptr);
  expect(offsets == expected.groups.offsets, name + ": offsets");
  expect(row_map == expected.row_map, name + ": row_map");
  expect(same_rows(slot_of_row), name + ": slot_of_row");
  invert_row_map(row_map.data(), N, inverse.data(), nullptr);
  expect(same_rows(inverse), name + ": inverse");

  // In another order, of which some are no slots.
  std::vector<int32_t> order(N), kept;
  for (int64_t s = 0; s < N; ++s) order[s] = s % 5 ? static_cast<int32_t>(N - 1 - s) : -1;
  for (const bool with_row_map : {false, true}) {
    std::fill(row_map.begin(), row_map.end(), -7);
    make_plan(
        IdType::kI64, ids.data(), order.data(), N, E, with_row_map ? row_map.data() : nullptr,
        offsets.data(), slot_of_row.data(), workspace.data(), nullptr);
    kept.clear();
    for (int64_t e = 0; e < E; ++e) {
      expect(offsets[e] == static_cast<int32_t>(kept.size()), name + ": offsets of the order");
      for (const int32_t s : order) {
        if (s >= 0 && ids[s] == e) kept.push_back(s);
      }
    }
    for (size_t r = 0; r < kept.size(); ++r) {
      expect(slot_of_row[r] == kept[r], name + ": in order");
      if (!with_row_map) continue;
      expect(row_map[kept[r]] == static_cast<int32_t>(r), name + ": row_map of the order");
    }
  }
  invert_row_map(row_map.data(), N, inverse.data(), nullptr);
  for (size_t r = 0; r < kept.size(); ++r) {
    expect(inverse[r] == kept[r], name + ": inverse of the order");
  }

  const std::vector<int32_t> narrow(ids.begin(), ids.end());
  std::vector<int64_t> counts(E, -7), expected_counts(E);
  for (int64_t e = 0; e < E; ++e) expected_counts[e] = std::count(ids.begin(), ids.end(), e);
  count_experts(IdType::kI32, narrow.data(), N, E, counts.data(), nullptr);
  expect(counts == expected_counts, name + ": counts");
}

// Tokens to rows, and back with a bias.
void test_permute(
    Type type, int64_t T, int64_t K, int64_t E, int64_t H, int64_t offset, IdKind kind,
    std::mt19937& random) {
  const std::string name =
      describe("permute", "type", type, "H", H, "offset", offset, "kind", int{kind});
  const int64_t N = T * K;
  const oracle::Plan plan = oracle::plan(make_ids(N, E, kind, random), K, E);
  const oracle::Groups& groups = plan.groups;
  const Buffer tokens(type, T * H, random, 1, offset), bias(type, E * H, random, 1, offset);
  const Buffer weights(compute_of(type), N, random);
  Buffer rows(type, N * H, offset), out(type, T * H, offset);
  const int32_t used = static_cast<int32_t>(groups.used());
  gather_rows(
      type, tokens.data(), plan.slot_of_row.data(), &used, N, K, H, rows.fill(-7).data(), nullptr);
  unpermute(
      type, rows.data(), plan.row_map.data(), weights.data(), T, {K, nullptr, nullptr},
      {bias.data(), E, groups.offsets.data()}, H, out.data(), nullptr);
  Numbers expected(N * H);
  groups.each([&](int64_t r, int64_t) {
    std::copy_n(&tokens.values[groups.token_of(r) * H], H, &expected[r * H]);
  });
  check(name, rows, expected, 0.0);
  oracle::add_bias(groups, bias.values, H, expected);
  const oracle::Unpermuted unpermuted =
      oracle::unpermute(plan.row_map, K, H, expected, weights.values, tokens.values);
  check(name + ", and back", out, unpermuted.out, Tolerance{1e-14, 1e-6, 0x1p-7, 0x1p-10});
}

// Rows of 5 experts, of which one is idle, and 3 rows past them.
const oracle::Groups kGroups{{0, 3, 3, 3 + 150, 160, 171}};
constexpr int64_t kRows = 174;
constexpr double kBlank = -7;  // what nobody writes

RowGroups row_groups(Type type) { return {type, kRows, kGroups.E(), kGroups.offsets.data()}; }

// A result that is not written past the rows in use.
Buffer blank(Type type, int64_t count, int64_t offset) {
  return std::move(Buffer(type, count, offset).fill(kBlank));
}

// The products of both kinds; k_dense: how the weights lie.
void test_products(
    Type type, bool tf32, int64_t N, int64_t K, bool k_dense, int64_t offset,
    std::mt19937& random) {
  const std::string name = describe(
      "product", "type", type, "tf32", tf32, "N", N, "K", K, "k_dense", k_dense, "offset", offset);
  const Tolerance tolerance{1e-14, tf32 ? 0x1p-10 : 1e-5, 0x1p-7, 0x1p-10};
  const int64_t E = kGroups.E();
  const Buffer rows(type, kRows * K, random, 1, offset);
  const Buffer weights(type, E * N * K, random, 1, offset);
  const Buffer right(type, kRows * N, random, 1, offset);
  Numbers expected(kRows * N);
  oracle::add_product(kGroups, rows.values, weights.values, N, K, k_dense, expected);
  std::fill(expected.begin() + kGroups.used() * N, expected.end(), kBlank);
  Buffer out = blank(type, kRows * N, offset);
  const ProductArgs args{
      row_groups(type), N,          K,   rows.data(), K, weights.data(), N * K, k_dense ? K : 1,
      k_dense ? 1 : N,  out.data(), tf32};
  grouped_product(args, nullptr);
  check(name, out, expected, tolerance);
  if (k_dense) {
    out.fill(kBlank);
    grouped_product_of_few_rows(args, nullptr);
    check(name + ", few rows", out, expected, tolerance);
  }
  Buffer grad = blank(type, E * K * N, offset);
  grouped_grad_weights(
      {row_groups(type), K, N, rows.data(), right.data(), grad.data(), tf32}, nullptr);
  check(
      name + ", gradient", grad, oracle::grad_weights(kGroups, rows.values, right.values, K, N),
      tolerance);
}

// What is done to rows between the products.
void test_experts(
    Type type, moe_ext::Activation activation, bool gated, int64_t I, int64_t H, bool with_slots,
    int64_t offset, std::mt19937& random) {
  const std::string name = describe(
      "experts", "type", type, "activation", static_cast<int>(activation), "gated", gated, "I", I,
      "offset", offset);
  const Tolerance tolerance{1e-13, 1e-5, 0x1p-7, 0x1p-10};
  const RowGroups groups = row_groups(type);
  const int64_t E = kGroups.E(), W = gated ? 2 * I : I, used = kGroups.used();
  const Type compute = compute_of(type);
  const auto stored = [&](int64_t count) { return Buffer(type, count, random, 1, offset); };
  const Buffer hidden = stored(kRows * W), hidden_bias = stored(E * W), grad = stored(kRows * I);
  const Buffer grad_out = stored(kRows * H), bias = stored(E * H);
  const Buffer weights(compute, kRows, random);
  std::vector<int32_t> slots(kRows);
  for (int64_t r = 0; r < kRows; ++r) {
    slots[r] = static_cast<int32_t>(with_slots ? kRows - 1 - r : r);
  }
  const int32_t* slot_of_row = with_slots ? slots.data() : nullptr;

  Numbers pre = hidden.values, row_weights(kRows), expected_grad_weights(kRows, kBlank);
  oracle::add_bias(kGroups, hidden_bias.values, W, pre);
  for (int64_t r = 0; r < kRows; ++r) row_weights[r] = weights.values[slots[r]];
  const oracle::Activated expected =
      oracle::activate(kGroups, activation, gated, pre, grad.values, row_weights, I, kBlank);
  Numbers biased = grad_out.values, finished;
  oracle::add_bias(kGroups, bias.values, H, biased);
  std::fill(biased.begin() + used * H, biased.end(), 0);
  finished = biased;
  kGroups.each([&](int64_t r, int64_t e) {
    double dot = expected.dots[r];
    for (int64_t h = 0; h < H; ++h) {
      dot += grad_out.values[r * H + h] * bias.values[e * H + h];
      finished[r * H + h] *= weights.values[r];
    }
    expected_grad_weights[slots[r]] = dot;
  });

  Buffer activated = blank(type, kRows * I, offset);
  activate(
      groups, activation, gated, hidden.data(), hidden_bias.data(), I, activated.data(), nullptr);
  check(name + ": activated", activated, expected.activated, tolerance);

  Buffer grad_of_hidden = blank(type, kRows * W, offset), weighted = blank(type, kRows * I, offset);
  Buffer grad_weights = blank(compute, kRows, 0);
  GradHiddenArgs args{
      groups,
      activation,
      gated,
      I,
      H,
      hidden.data(),
      hidden_bias.data(),
      grad.data(),
      weights.data(),
      slot_of_row,
      grad_out.data(),
      bias.data(),
      grad_of_hidden.data(),
      weighted.data(),
      grad_weights.data()};
  grad_hidden(args, nullptr);
  check(name + ": grad_hidden", grad_of_hidden, expected.grad_hidden, tolerance);
  check(name + ": weighted", weighted, expected.weighted, tolerance);
  check(
      name + ": grad_weights", grad_weights, expected_grad_weights,
      std::min(tolerance.of(type), 1e-4));
  // In place, and each result alone.
  Buffer hidden_in_place = hidden, grad_in_place = grad;
  args.hidden = args.grad_hidden = hidden_in_place.data();
  args.grad = args.weighted = grad_in_place.data();
  args.grad_weights = nullptr;
  grad_hidden(args, nullptr);
  const auto same = [&](Buffer& a, const Buffer& b, int64_t columns) {
    return std::memcmp(a.data(), b.data(), used * columns * size_of(type)) == 0;
  };
  expect(same(hidden_in_place, grad_of_hidden, W), name + ": grad_hidden in place");
  expect(same(grad_in_place, weighted, I), name + ": weighted in place");

  Buffer sum = blank(type, E * H, offset);
  sum_rows(groups, grad_out.data(), weights.data(), slot_of_row, H, sum.data(), nullptr);
  check(
      name + ": sums", sum, oracle::sum_rows(kGroups, grad_out.values, row_weights, H), tolerance);
  Buffer rows = grad_out;
  weigh_rows(groups, bias.data(), nullptr, H, rows.data(), nullptr);
  check(name + ": biased", rows, biased, tolerance);
  rows = grad_out;
  weigh_rows(groups, bias.data(), weights.data(), H, rows.data(), nullptr);
  check(name + ": finished", rows, finished, tolerance);
  rows = grad_out;
  weigh_rows(groups, nullptr, nullptr, H, rows.data(), nullptr);
  expect(same(rows, grad_out, H), name + ": finished without weights");
  rows.read();
  expect(
      std::all_of(
          rows.values.begin() + used * H, rows.values.end(), [](double x) { return x == 0; }),
      name + ": the tail");
  Buffer idle = blank(type, E * H, offset);
  zero_idle_experts(groups, H, idle.data(), nullptr);
  Numbers expected_idle(E * H, kBlank);
  std::fill_n(expected_idle.begin() + H, H, 0.0);
  check(name + ": the idle", idle, expected_idle, 0.0);
}

template <class T>
std::vector<T> numbers(int64_t count, std::mt19937& random) {
  std::normal_distribution<double> normal;
  std::vector<T> values(count);
  for (T& value : values) value = static_cast<T>(normal(random));
  return values;
}

// Capacity, rounding and expert choice against sorts; distinct ids in a row.
template <class T>
void test_pairs(
    int64_t tokens, int64_t K, int64_t E, int64_t M, double factor, bool few_values,
    std::mt19937& random) {
  const std::string name = describe(
      "pairs", "T", tokens, "K", K, "E", E, "M", M, "bytes", sizeof(T), "few values", few_values);
  const Type type = sizeof(T) == 8 ? Type::kF64 : Type::kF32;
  const int64_t N = tokens * K;
  std::vector<T> weights = numbers<T>(N, random), probs = numbers<T>(tokens * E, random);
  const auto coarsen = [&](T& value) {
    if (!few_values) return;
    value = static_cast<T>(std::round(value));  // ties, zeros of both signs
    if (random() % 30 == 0) value = static_cast<T>(NAN);
    if (random() % 30 == 0) value = static_cast<T>(-INFINITY);
  };
  for (T& w : weights) coarsen(w);
  for (T& p : probs) coarsen(p);
  std::vector<int64_t> ids(N);
  std::vector<int64_t> all(E);
  std::unique_ptr<bool[]> mask(new bool[tokens + 1]);
  for (int64_t e = 0; e < E; ++e) all[e] = e;
  for (int64_t t = 0; t < tokens; ++t) {
    std::shuffle(all.begin(), all.end(), random);
    mask[t] = random() % 4 > 0;
    for (int64_t k = 0; k < K; ++k) ids[t * K + k] = mask[t] && random() % 9 > 0 ? all[k] : -1;
  }
  std::vector<std::vector<int64_t>> slots(E);  // of each expert
  std::vector<int64_t> counts(E);
  for (int64_t s = 0; s < N; ++s) {
    if (ids[s] >= 0) slots[ids[s]].push_back(s);
  }
  for (int64_t e = 0; e < E; ++e) counts[e] = static_cast<int64_t>(slots[e].size());
  const auto is_routed = [&](int64_t t) {
    return std::any_of(&ids[t * K], &ids[t * K] + K, [](int64_t id) { return id >= 0; });
  };
  int64_t routed = 0;
  for (int64_t t = 0; t < tokens; ++t) routed += is_routed(t);

  CapacityArgs capacity{tokens, K, E, ids.data(), &factor, 2};
  const int64_t limit = moe_ext::capacity_of(
      factor, std::accumulate(counts.begin(), counts.end(), int64_t{0}), routed, E, 2);
  std::vector<char> workspace(capacity_workspace(type, capacity));
  std::vector<int64_t> kept(N, -7), expected(N, -1);
  for (int64_t e = 0; e < E; ++e) {
    for (const int64_t slot : oracle::best(slots[e], weights.data(), limit)) expected[slot] = e;
  }
  apply_capacity(type, capacity, weights.data(), kept.data(), workspace.data(), nullptr);
  expect(kept == expected, name + ": capacity by weight");
  std::fill(expected.begin(), expected.end(), -1);
  std::vector<int64_t> used(E);
  for (int64_t k = 0; k < K; ++k) {
    for (int64_t slot = k; slot < N; slot += K) {
      if (ids[slot] >= 0 && used[ids[slot]]++ < limit) expected[slot] = ids[slot];
    }
  }
  apply_capacity(type, capacity, nullptr, kept.data(), workspace.data(), nullptr);
  expect(kept == expected, name + ": capacity by position");

  struct List {
    std::vector<int64_t> tokens, experts, slots;
    explicit List(int64_t size) : tokens(size, -7), experts(size, -7), slots(size, -7) {}
    int64_t size() const { return static_cast<int64_t>(tokens.size()); }
    PairList list() const { return {size(), tokens.data(), experts.data(), slots.data()}; }
    MutablePairList buffer() { return {size(), tokens.data(), experts.data(), slots.data()}; }
    void write(int64_t at, int64_t t, int64_t e, int64_t slot) {
      tokens[at] = t;
      experts[at] = e;
      slots[at] = slot;
    }
    bool operator==(const List& other) const {
      return tokens == other.tokens && experts == other.experts && slots == other.slots;
    }
  };
  const std::vector<double> noise(E, 0.3);
  // The best of the tokens that are candidates, by their probabilities of e.
  const auto best_tokens = [&](int64_t e, int64_t count, const auto& is_candidate) {
    std::vector<int64_t> candidates;
    std::vector<T> keys;
    for (int64_t t = 0; t < tokens; ++t) {
      keys.push_back(probs[t * E + e]);
      if (is_candidate(t)) candidates.push_back(t);
    }
    return oracle::best(candidates, keys.data(), count);
  };
  for (const auto rounding :
       {moe_ext::Rounding::kNearest, moe_ext::Rounding::kUp, moe_ext::Rounding::kDown,
        moe_ext::Rounding::kStochastic, moe_ext::Rounding::kBalanced}) {
    capacity.factor = rounding == moe_ext::Rounding::kUp ? &factor : nullptr;
    const int64_t most = capacity.factor ? limit : routed;
    List pairs(N + E * M), expected_pairs(N + E * M);
    std::fill(expected.begin(), expected.end(), -1);
    int64_t at = 0;
    for (int64_t e = 0; e < E; ++e) {
      const int64_t count =
          moe_ext::round_count(counts.data(), e, E, M, most, rounding, noise.data());
      const auto pads = [&](int64_t t) {
        return is_routed(t) && std::count(&ids[t * K], &ids[t * K] + K, e) == 0;
      };
      std::vector<std::pair<int64_t, int64_t>> both;
      for (const int64_t t : best_tokens(e, std::max<int64_t>(count - counts[e], 0), pads)) {
        both.push_back({t, -1});
      }
      for (const int64_t slot : oracle::best(slots[e], weights.data(), count)) {
        both.push_back({slot / K, slot});
        expected[slot] = e;
      }
      std::sort(both.begin(), both.end());
      for (const auto& [t, slot] : both) expected_pairs.write(at++, t, e, slot);
    }
    for (; at < N + E * M; ++at) expected_pairs.write(at, -1, -1, -1);
    round_tokens(
        type, {capacity, M, rounding, noise.data()}, probs.data(), weights.data(), pairs.buffer(),
        kept.data(), workspace.data(), nullptr);
    const std::string mode = ": rounding " + std::to_string(static_cast<int>(rounding));
    expect(kept == expected, name + mode + ", kept");
    expect(pairs == expected_pairs, name + mode);

    const std::vector<T> topk = numbers<T>(N, random), p = numbers<T>(tokens * E, random);
    std::vector<T> of_pair(pairs.tokens.size()), expected_weights(of_pair.size());
    pair_weights(type, topk.data(), p.data(), pairs.list(), E, 2, of_pair.data(), nullptr);
    const std::vector<T> grad = numbers<T>(of_pair.size(), random);
    std::vector<T> dw(N), dp(tokens * E), expected_dw(N), expected_dp(tokens * E);
    pair_weights_backward(type, grad.data(), pairs.list(), E, 2, dw.data(), dp.data(), nullptr);
    for (size_t i = 0; i < of_pair.size() && pairs.tokens[i] >= 0; ++i) {
      const int64_t cell = pairs.tokens[i] * E + pairs.experts[i];
      if (pairs.slots[i] >= 0) {
        expected_weights[i] = topk[pairs.slots[i]];
        expected_dw[pairs.slots[i]] = grad[i];
      } else {
        expected_weights[i] = 2 * p[cell];
        expected_dp[cell] = 2 * grad[i];
      }
    }
    expect(
        of_pair == expected_weights && dw == expected_dw && dp == expected_dp,
        name + mode + ", weights");
  }

  const int64_t unmasked = std::count(mask.get(), mask.get() + tokens, true);
  const int64_t share = std::min((unmasked * K + E - 1) / E, unmasked);
  List pairs(E * tokens), expected_pairs(E * tokens);
  int64_t at = 0;
  for (int64_t e = 0; e < E; ++e) {
    for (const int64_t t : best_tokens(e, share, [&](int64_t t) { return mask[t]; })) {
      expected_pairs.write(at++, t, e, -1);
    }
  }
  for (; at < E * tokens; ++at) expected_pairs.write(at, -1, -1, -1);
  std::vector<char> small(expert_choice_workspace());
  expert_choice(
      type, probs.data(), mask.get(), tokens, E, K, pairs.buffer(), small.data(), nullptr);
  expect(pairs == expected_pairs, name + ": expert choice");
}

// The balance loss, its gradient, and the entropy.
void test_losses(
    Type type, int64_t S, int64_t length, int64_t E, int64_t K, int masked, bool normalize,
    bool with_share, std::mt19937& random) {
  const std::string name =
      describe("losses", "type", type, "S", S, "length", length, "E", E, "masked", masked);
  constexpr Tolerance kTolerance{1e-13, 1e-5, 0, 0};
  const int64_t T = S * length;
  const std::vector<int64_t> ids = make_ids(T * K, E, shared_tests::kSomeSkipped, random);
  Buffer probs(type, T * E);
  for (double& p : probs.values) p = static_cast<double>(random() % 1000) / 1000;
  probs.write();
  Numbers share(E);
  for (double& f : share) f = static_cast<double>(random() % 1000) / 1000;
  std::unique_ptr<bool[]> mask(new bool[T + 1]);
  for (int64_t t = 0; t < T; ++t) {
    mask[t] = masked == 2 ? false : masked == 1 && t < length ? false : random() % 3 > 0;
  }
  const auto used = [&](int64_t t) { return masked == 0 || mask[t]; };

  std::vector<char> workspace(loss_workspace(S, E) + 64);
  const LossArgs args{type, T, E, masked == 0 ? nullptr : mask.get(), workspace.data()};
  Buffer loss(type, 1), entropy(type, 1), row(type, S * E), grad_probs(type, T * E), three(type, 1);
  load_balancing_loss(
      args, probs.data(), IdType::kI64, ids.data(), K, normalize, S,
      with_share ? share.data() : nullptr, row.data(), loss.data(), nullptr);
  load_balancing_loss_backward(
      args, three.fill(3).data(), row.data(), S, grad_probs.data(), nullptr);
  router_entropy(args, probs.data(), entropy.data(), nullptr);

  int64_t all = 0, sequences = 0;
  Numbers f(S * E), mean(S * E), count(S);
  for (int64_t t = 0; t < T; ++t) count[t / length] += used(t);
  for (const double n : count) {
    all += static_cast<int64_t>(n);
    sequences += n > 0;
  }
  double expected_entropy = 0, expected_loss = 0;
  Numbers expected_grad(T * E);
  for (int64_t t = 0; t < T; ++t) {
    if (!used(t)) continue;
    const int64_t s = t / length;
    for (int64_t e = 0; e < E; ++e) {
      const double p = probs.values[t * E + e];
      mean[s * E + e] += p / count[s];
      expected_entropy -= p > 0 ? p * std::log(p) / all : 0;
    }
    for (int64_t k = 0; k < K; ++k) {
      const int64_t id = ids[t * K + k];
      if (id >= 0 && id < E) f[s * E + id] += 1 / (count[s] * K);
    }
  }
  for (int64_t i = 0; i < S * E; ++i) {
    if (with_share && count[i / E] > 0) f[i] = share[i % E];
    f[i] *= E * (normalize ? 1.0 : static_cast<double>(K)) / std::max<int64_t>(sequences, 1);
    expected_loss += f[i] * mean[i];
  }
  for (int64_t i = 0; i < T * E; ++i) {
    const int64_t t = i / E, s = t / length;
    if (used(t)) expected_grad[i] = 3 * f[s * E + i % E] / count[s];
  }
  check(name + ": load balancing", loss, {expected_loss}, kTolerance);
  check(name + ": its gradient", grad_probs, expected_grad, kTolerance);
  check(name + ": entropy", entropy, {expected_entropy}, kTolerance);
}

struct ProductCase {
  int64_t N, K, offset;
};
constexpr ProductCase kProducts[] = {{1, 1, 1}, {24, 40, 0}, {130, 19, 1}};

struct PairCase {
  Type type;
  int64_t T, K, E, tile;
  double factor;
};
constexpr PairCase kPairs[] = {
    {Type::kF32, 1, 1, 1, 1, 1.0},    {Type::kF32, 300, 2, 5, 16, 0.7},
    {Type::kF64, 600, 3, 40, 8, 1.2}, {Type::kF32, 513, 6, 7, 64, INFINITY},
    {Type::kF64, 70, 4, 4, 32, 0.01},
};

struct LossCase {
  Type type;
  int64_t S, length, E, K;
  bool normalize, with_share;
};
constexpr LossCase kLosses[] = {
    {Type::kF64, 1, 0, 4, 2, true, false},    {Type::kF64, 1, 1, 1, 1, true, false},
    {Type::kF64, 1, 90, 33, 2, false, false}, {Type::kF32, 1, 90, 8, 3, true, true},
    {Type::kF32, 3, 40, 40, 2, true, false},
};

}  // namespace

int main() {
  std::mt19937 random(1);
  shared_tests::test_all<Cuda>(random);
  for (const IdKind kind : shared_tests::kIdKinds) {
    for (const int64_t N : {0, 1, 40, 700}) test_plan(N, 9, kind, random);
    for (const Type type : kTypes) {
      for (const int64_t H : {1, 8, 33, 600}) {
        for (const int64_t offset : {0, 1}) test_permute(type, 19, 3, 5, H, offset, kind, random);
      }
    }
  }
  for (const auto& [N, K, offset] : kProducts) {
    for (const bool k_dense : {true, false}) {
      for (const Type type : kTypes) test_products(type, false, N, K, k_dense, offset, random);
      test_products(Type::kF32, true, N, K, k_dense, offset, random);
    }
  }
  for (int i = 0; i < 7; ++i) {
    const auto activation = static_cast<moe_ext::Activation>(i);
    for (const bool gated : {true, false}) {
      if (activation == moe_ext::Activation::kSwigluClamped && !gated) continue;
      const int64_t I = i % 3 == 0 ? 1100 : 24;
      test_experts(Type::kF64, activation, gated, 10, 33, gated, i % 2, random);
      if (i % 2) {
        test_experts(Type::kBf16, activation, gated, I, 40, gated, 0, random);
        test_experts(Type::kF16, activation, gated, 7, 40, !gated, 1, random);
      } else {
        test_experts(Type::kF32, activation, gated, I, 40, gated, 0, random);
      }
    }
  }
  for (const auto& [type, T, K, E, tile, factor] : kPairs) {
    for (const bool few_values : {false, true}) {
      if (type == Type::kF64) {
        test_pairs<double>(T, K, E, tile, factor, few_values, random);
      } else {
        test_pairs<float>(T, K, E, tile, factor, few_values, random);
      }
    }
  }
  for (const auto& [type, S, length, E, K, normalize, with_share] : kLosses) {
    for (const int masked : {0, 1, 2}) {
      test_losses(type, S, length, E, K, masked, normalize, with_share, random);
    }
  }
  return finish();
}
