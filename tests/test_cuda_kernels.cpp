// The CUDA kernels on the host, against the CPU's: `make test-kernels`. What only a GPU can show
// (that nvcc's code does the same, races between blocks, speed) is not tested here. The Makefile
// puts cuda_emulation.h before everything.
#include <cstdio>
#include <random>
#include <string>

#include "cpu/kernels/kernels.h"
#include "cpu/select.h"
#include "cuda/kernels/aux_loss.cu"
#include "cuda/kernels/experts.cu"
#include "cuda/kernels/grouped_gemm.cu"
#include "cuda/kernels/pairs.cu"
#include "cuda/kernels/plan.cu"
#include "cuda/kernels/router.cu"
#include "cuda/kernels/unpermute.cu"

namespace {

using moe_ext::ScoreFunction;
namespace cpu = moe_ext::kernels;
namespace cuda = moe_ext::cuda;
using cuda::BFloat16;
using cuda::Half;

int failures = 0;

void expect(bool holds, const std::string& what) {
  if (holds) return;
  std::printf("%s\n", what.c_str());
  ++failures;
}

// max|a - b| / max|b|
template <class T>
double error(const std::vector<T>& actual, const std::vector<T>& expected) {
  double difference = 0, largest = 1e-30;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double a = actual[i], b = expected[i];
    if (a != a || b != b) {
      if ((a != a) != (b != b)) return INFINITY;
      continue;
    }
    difference = std::max(difference, std::fabs(a - b));
    largest = std::max(largest, std::fabs(b));
  }
  return difference / largest;
}

template <class T>
std::vector<T> randoms(int64_t count, std::mt19937& random) {
  std::normal_distribution<double> normal;
  std::vector<T> values(count);
  for (T& value : values) value = static_cast<T>(normal(random));
  return values;
}

// O(1) numbers as they are stored, `offset` elements into the memory, and as doubles.
template <class T>
std::vector<T> store_randoms(
    int64_t count, int64_t offset, std::vector<double>& values, std::mt19937& random) {
  values = randoms<double>(count, random);
  std::vector<T> data(count + offset);
  for (int64_t i = 0; i < count; ++i) {
    data[offset + i] = cuda::narrow<T>(static_cast<cuda::Compute<T>>(values[i]));
    values[i] = cuda::widen(data[offset + i]);
  }
  return data;
}

template <class T>
std::vector<double> widen_all(const std::vector<T>& data, int64_t offset) {
  std::vector<double> values;
  for (size_t i = offset; i < data.size(); ++i) values.push_back(cuda::widen(data[i]));
  return values;
}

// kinds: 0 random, 1 one expert, 2 with skipped ones, 3 all skipped.
std::vector<int64_t> make_ids(int64_t N, int64_t E, int kind, std::mt19937& random) {
  std::vector<int64_t> ids(N);
  for (int64_t& id : ids) {
    id = kind == 1   ? E - 1
         : kind == 3 ? -1
                     : static_cast<int64_t>(random() % (kind == 2 ? E + 3 : E)) - (kind == 2);
  }
  return ids;
}

struct PlanOf {
  std::vector<int32_t> row_map, offsets, slot_of_row;
};

PlanOf plan(const std::vector<int64_t>& ids, int64_t E) {
  const int64_t N = ids.size();
  PlanOf p{
      std::vector<int32_t>(N, -7), std::vector<int32_t>(E + 1, -7), std::vector<int32_t>(N, -7)};
  std::vector<char> workspace(cuda::plan_workspace(N, E));
  cuda::make_plan(
      cuda::IdType::kI64, ids.data(), nullptr, N, E, p.row_map.data(), p.offsets.data(),
      p.slot_of_row.data(), workspace.data(), nullptr);
  return p;
}

void test_plan(int64_t N, int64_t E, int kind, std::mt19937& random) {
  const std::string name = "plan of " + std::to_string(N) + " slots, kind " + std::to_string(kind);
  const std::vector<int64_t> ids = make_ids(N, E, kind, random);
  const PlanOf p = plan(ids, E);
  int32_t row = 0;
  std::vector<int64_t> counts(E), expected_counts(E);
  for (int64_t e = 0; e < E; ++e) {
    expect(p.offsets[e] == row, name + ": offsets");
    for (int64_t s = 0; s < N; ++s) {
      if (ids[s] != e) continue;
      expect(p.row_map[s] == row && p.slot_of_row[row] == s, name + ": rows");
      ++row;
      ++expected_counts[e];
    }
  }
  expect(p.offsets[E] == row, name + ": last offset");
  for (int64_t s = 0; s < N; ++s) {
    if (ids[s] < 0 || ids[s] >= E) expect(p.row_map[s] == -1, name + ": skipped");
  }
  // In another order, of which some are no slots.
  std::vector<int32_t> order(N), ordered(N, -7), offsets(E + 1), kept;
  for (int64_t s = 0; s < N; ++s) order[s] = s % 5 ? static_cast<int32_t>(N - 1 - s) : -1;
  std::vector<char> workspace(cuda::plan_workspace(N, E));
  cuda::make_plan(
      cuda::IdType::kI64, ids.data(), order.data(), N, E, nullptr, offsets.data(), ordered.data(),
      workspace.data(), nullptr);
  std::vector<int32_t> row_map(N, -7), inverse(N, -7);
  cuda::make_plan(
      cuda::IdType::kI64, ids.data(), order.data(), N, E, row_map.data(), offsets.data(),
      ordered.data(), workspace.data(), nullptr);
  for (int64_t e = 0; e < E; ++e) {
    expect(offsets[e] == static_cast<int32_t>(kept.size()), name + ": offsets of the order");
    for (const int32_t s : order) {
      if (s >= 0 && ids[s] == e) kept.push_back(s);
    }
  }
  for (size_t r = 0; r < kept.size(); ++r) {
    expect(ordered[r] == kept[r], name + ": in order");
    expect(row_map[kept[r]] == static_cast<int32_t>(r), name + ": row_map of the order");
  }
  cuda::invert_row_map(row_map.data(), N, inverse.data(), nullptr);
  for (size_t r = 0; r < kept.size(); ++r) expect(inverse[r] == kept[r], name + ": inverse");

  const std::vector<int32_t> narrow(ids.begin(), ids.end());
  cuda::count_experts(cuda::IdType::kI32, narrow.data(), N, E, counts.data(), nullptr);
  expect(counts == expected_counts, name + ": counts");
}

// Through permute, unpermute and its backward in a storage type, against sums in double.
template <class T>
void test_rows(
    moe_ext::Type type, int64_t tokens, int64_t K, int64_t E, int64_t H, int64_t offset, int kind,
    double tolerance, std::mt19937& random) {
  const std::string name = "rows of type " + std::to_string(static_cast<int>(type)) + ", H " +
                           std::to_string(H) + ", kind " + std::to_string(kind);
  using C = cuda::Compute<T>;
  const int64_t N = tokens * K;
  const std::vector<int64_t> ids = make_ids(N, E, kind, random);
  const PlanOf p = plan(ids, E);
  const auto stored = [&](int64_t count, std::vector<double>& values) {
    return store_randoms<T>(count, offset, values, random);
  };
  const auto widened = [&](const std::vector<T>& data) { return widen_all(data, offset); };
  std::vector<double> x, g;
  const std::vector<T> tokens_data = stored(tokens * H, x), grad_data = stored(tokens * H, g);
  const std::vector<C> weights = randoms<C>(N, random);

  std::vector<T> rows(N * H + offset), out(tokens * H + offset);
  cuda::gather_rows(
      type, tokens_data.data() + offset, p.slot_of_row.data(), &p.offsets[E], N, K, H,
      rows.data() + offset, nullptr);
  cuda::unpermute(
      type, rows.data() + offset, p.row_map.data(), weights.data(), tokens, {K, nullptr, nullptr},
      {}, H, out.data() + offset, nullptr);
  std::vector<double> expected_rows(N * H), expected_out(tokens * H), expected_grad(N * H);
  std::vector<C> expected_weights(N), grad_weights(N, C(-7));
  std::vector<double> b;
  const std::vector<T> bias = stored(E * H, b);
  std::vector<T> biased(tokens * H + offset);
  std::vector<double> expected_biased(tokens * H);
  cuda::unpermute(
      type, rows.data() + offset, p.row_map.data(), weights.data(), tokens, {K, nullptr, nullptr},
      {bias.data() + offset, E, p.offsets.data()}, H, biased.data() + offset, nullptr);
  for (int64_t s = 0; s < N; ++s) {
    const int64_t row = p.row_map[s], t = s / K;
    if (row < 0) continue;
    double dot = 0;
    for (int64_t h = 0; h < H; ++h) {
      expected_rows[row * H + h] = x[t * H + h];
      expected_out[t * H + h] += static_cast<double>(weights[s]) * x[t * H + h];
      expected_biased[t * H + h] +=
          static_cast<double>(weights[s]) * (x[t * H + h] + b[ids[s] * H + h]);
      expected_grad[row * H + h] = static_cast<double>(weights[s]) * g[t * H + h];
      dot += g[t * H + h] * x[t * H + h];
    }
    expected_weights[s] = static_cast<C>(dot);
  }
  expect(error(widened(rows), expected_rows) == 0, name + ": permuted");
  expect(error(widened(out), expected_out) < tolerance, name + ": unpermuted");
  expect(error(widened(biased), expected_biased) < tolerance, name + ": with a bias");
  std::vector<T> grad_rows(N * H + offset);
  cuda::unpermute_backward(
      type, grad_data.data() + offset, rows.data() + offset, p.row_map.data(), weights.data(),
      tokens, K, H, grad_rows.data() + offset, grad_weights.data(), nullptr);
  expect(error(widened(grad_rows), expected_grad) < tolerance, name + ": grad_rows");
  expect(error(grad_weights, expected_weights) < 1e-5, name + ": grad_weights");
}

// Rows of 5 experts, of which one is idle, and 3 rows past them.
struct GroupedRows {
  std::vector<int32_t> offsets{0, 3, 3, 3 + 150, 160, 171};
  static constexpr int64_t kExperts = 5, kRows = 174;

  int64_t used() const { return offsets.back(); }
  int64_t expert_of(int64_t row) const {
    int64_t e = 0;
    while (row >= offsets[e + 1]) ++e;
    return e;
  }
  cuda::ExpertRows rows(moe_ext::Type type) const {
    return {type, kRows, kExperts, offsets.data()};
  }
};

// The products of both kinds against sums in double; k_dense: how the weights lie.
template <class T>
void test_products(
    moe_ext::Type type, bool tf32, int64_t N, int64_t K, bool k_dense, int64_t offset,
    double tolerance, std::mt19937& random) {
  const std::string name = "product of type " + std::to_string(static_cast<int>(type)) + " tf32 " +
                           std::to_string(tf32) + " N " + std::to_string(N) + " K " +
                           std::to_string(K) + " k_dense " + std::to_string(k_dense) + " offset " +
                           std::to_string(offset);
  const GroupedRows grouped;
  constexpr int64_t E = GroupedRows::kExperts, R = GroupedRows::kRows;
  std::vector<double> x, w, y;
  const std::vector<T> rows = store_randoms<T>(R * K, offset, x, random);
  const std::vector<T> weights = store_randoms<T>(E * N * K, offset, w, random);
  const std::vector<T> right = store_randoms<T>(R * N, offset, y, random);
  const auto weight = [&](int64_t e, int64_t n, int64_t k) {
    return w[e * N * K + (k_dense ? n * K + k : k * N + n)];
  };
  std::vector<double> expected(R * N, -7), expected_grad(E * K * N);
  for (int64_t r = 0; r < grouped.used(); ++r) {
    const int64_t e = grouped.expert_of(r);
    for (int64_t n = 0; n < N; ++n) {
      double sum = 0;
      for (int64_t k = 0; k < K; ++k) {
        sum += x[r * K + k] * weight(e, n, k);
        expected_grad[(e * K + k) * N + n] += x[r * K + k] * y[r * N + n];
      }
      expected[r * N + n] = sum;
    }
  }
  std::vector<T> out(R * N + offset, cuda::narrow<T>(-7));
  const cuda::ProductArgs args{
      grouped.rows(type),
      N,
      K,
      rows.data() + offset,
      K,
      weights.data() + offset,
      N * K,
      k_dense ? K : 1,
      k_dense ? 1 : N,
      out.data() + offset,
      tf32};
  cuda::grouped_product(args, nullptr);
  expect(error(widen_all(out, offset), expected) < tolerance, name);
  if (k_dense) {
    std::fill(out.begin(), out.end(), cuda::narrow<T>(-7));
    cuda::grouped_product_of_few_rows(args, nullptr);
    expect(error(widen_all(out, offset), expected) < tolerance, name + ", few rows");
  }
  std::vector<T> grad(E * K * N + offset, cuda::narrow<T>(-7));
  cuda::grouped_grad_weights(
      {grouped.rows(type), K, N, rows.data() + offset, right.data() + offset, grad.data() + offset,
       tf32},
      nullptr);
  expect(error(widen_all(grad, offset), expected_grad) < tolerance, name + ", gradient");
}

// What is done to rows between the products, against the same in double.
template <class T>
void test_experts(
    moe_ext::Type type, moe_ext::Activation activation, bool gated, int64_t I, int64_t H,
    bool with_slots, int64_t offset, double tolerance, std::mt19937& random) {
  const std::string name = "experts of type " + std::to_string(static_cast<int>(type)) +
                           " activation " + std::to_string(static_cast<int>(activation)) +
                           " gated " + std::to_string(gated) + " I " + std::to_string(I) +
                           " offset " + std::to_string(offset);
  using C = cuda::Compute<T>;
  const GroupedRows grouped;
  const cuda::ExpertRows experts = grouped.rows(type);
  constexpr int64_t E = GroupedRows::kExperts, R = GroupedRows::kRows;
  const int64_t W = gated ? 2 * I : I, used = grouped.used();
  std::vector<double> h, hb, g, d, b;
  const std::vector<T> hidden = store_randoms<T>(R * W, offset, h, random);
  const std::vector<T> hidden_bias = store_randoms<T>(E * W, offset, hb, random);
  const std::vector<T> grads = store_randoms<T>(R * I, offset, g, random);
  const std::vector<T> grad_out = store_randoms<T>(R * H, offset, d, random);
  const std::vector<T> bias = store_randoms<T>(E * H, offset, b, random);
  const std::vector<C> weights = randoms<C>(R, random);
  std::vector<int32_t> slots(R);
  for (int64_t r = 0; r < R; ++r) slots[r] = static_cast<int32_t>(with_slots ? R - 1 - r : r);
  const int32_t* slot_of_row = with_slots ? slots.data() : nullptr;

  std::vector<double> activated(R * I, -7), grad_hidden(R * W, -7), weighted(R * I, -7);
  std::vector<double> sums(E * H), biased(R * H), finished(R * H);
  std::vector<C> grad_weights(R, C(-7));
  moe_ext::dispatch_activation(activation, gated, [&](auto f) {
    using F = decltype(f);
    for (int64_t r = 0; r < used; ++r) {
      const int64_t e = grouped.expert_of(r);
      const double weight = weights[slots[r]];
      double dot = 0;
      for (int64_t i = 0; i < I; ++i) {
        const double gate = h[r * W + i] + hb[e * W + i];
        const double up = gated ? h[r * W + I + i] + hb[e * W + I + i] : 0;
        const double a = F::value(gate, up);
        double grad_up = 0;
        F::grad(gate, up, weight * g[r * I + i], &grad_hidden[r * W + i], &grad_up);
        if (gated) grad_hidden[r * W + I + i] = grad_up;
        activated[r * I + i] = a;
        weighted[r * I + i] = weight * a;
        dot += a * g[r * I + i];
      }
      for (int64_t j = 0; j < H; ++j) {
        dot += d[r * H + j] * b[e * H + j];
        sums[e * H + j] += weight * d[r * H + j];
        biased[r * H + j] = d[r * H + j] + b[e * H + j];
        finished[r * H + j] = static_cast<double>(weights[r]) * biased[r * H + j];
      }
      grad_weights[slots[r]] = static_cast<C>(dot);
    }
  });

  const auto check = [&](const std::vector<T>& data, const std::vector<double>& expected,
                         const char* what) {
    expect(error(widen_all(data, offset), expected) < tolerance, name + ": " + what);
  };
  const auto blank = [&](int64_t count) {
    return std::vector<T>(count + offset, cuda::narrow<T>(-7));
  };
  std::vector<T> out = blank(R * I);
  cuda::activate(
      experts, activation, gated, hidden.data() + offset, hidden_bias.data() + offset, I,
      out.data() + offset, nullptr);
  check(out, activated, "activated");

  std::vector<T> dh = blank(R * W), aw = blank(R * I);
  std::vector<C> dw(R, C(-7));
  cuda::GradHiddenArgs args{
      experts,
      activation,
      gated,
      I,
      H,
      hidden.data() + offset,
      hidden_bias.data() + offset,
      grads.data() + offset,
      weights.data(),
      slot_of_row,
      grad_out.data() + offset,
      bias.data() + offset,
      dh.data() + offset,
      aw.data() + offset,
      dw.data()};
  cuda::grad_hidden(args, nullptr);
  check(dh, grad_hidden, "grad_hidden");
  check(aw, weighted, "weighted");
  expect(error(dw, grad_weights) < std::min(tolerance, 1e-4), name + ": grad_weights");
  // In place, and each result alone.
  std::vector<T> in_place = hidden, grads_in_place = grads;
  args.hidden = args.grad_hidden = in_place.data() + offset;
  args.grad = args.weighted = grads_in_place.data() + offset;
  args.grad_weights = nullptr;
  cuda::grad_hidden(args, nullptr);
  const auto same = [&](const std::vector<T>& a, const std::vector<T>& b, int64_t columns) {
    return std::memcmp(a.data() + offset, b.data() + offset, used * columns * sizeof(T)) == 0;
  };
  expect(same(in_place, dh, W) && same(grads_in_place, aw, I), name + ": in place");

  std::vector<T> sum = blank(E * H);
  cuda::sum_rows(
      experts, grad_out.data() + offset, weights.data(), slot_of_row, H, sum.data() + offset,
      nullptr);
  check(sum, sums, "sums");
  std::vector<T> rows = grad_out;
  cuda::finish_rows(experts, bias.data() + offset, nullptr, H, rows.data() + offset, nullptr);
  check(rows, biased, "biased");
  rows = grad_out;
  cuda::finish_rows(
      experts, bias.data() + offset, weights.data(), H, rows.data() + offset, nullptr);
  check(rows, finished, "finished");
  rows = grad_out;
  cuda::finish_rows(experts, nullptr, nullptr, H, rows.data() + offset, nullptr);
  expect(same(rows, grad_out, H), name + ": finished without weights");
  for (int64_t i = used * H; i < R * H; ++i) {
    expect(cuda::widen(rows[offset + i]) == 0, name + ": the tail");
  }
  std::vector<T> idle = blank(E * H);
  cuda::zero_idle_experts(experts, H, idle.data() + offset, nullptr);
  for (int64_t i = 0; i < E * H; ++i) {
    expect(cuda::widen(idle[offset + i]) == (i / H == 1 ? 0 : -7), name + ": the idle");
  }
}

// Capacity, rounding and expert choice against the CPU's selection; distinct ids in a row.
template <class T>
void test_pairs(
    int64_t tokens, int64_t K, int64_t E, int64_t M, double factor, bool few_values,
    std::mt19937& random) {
  const std::string name = "pairs T " + std::to_string(tokens) + " K " + std::to_string(K) + " E " +
                           std::to_string(E) + " M " + std::to_string(M) + " bytes " +
                           std::to_string(sizeof(T));
  const moe_ext::Type type = sizeof(T) == 8 ? moe_ext::Type::kF64 : moe_ext::Type::kF32;
  const int64_t N = tokens * K;
  std::vector<T> weights = randoms<T>(N, random), probs = randoms<T>(tokens * E, random);
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
  const moe_ext::cpu::SlotsByExpert slots(ids.data(), N, E);
  const int64_t routed = moe_ext::cpu::count_routed_tokens(ids.data(), tokens, K, E);

  cuda::CapacityArgs capacity{tokens, K, E, ids.data(), &factor, 2};
  const int64_t limit = moe_ext::capacity_of(factor, slots.offsets[E], routed, E, 2);
  std::vector<char> workspace(cuda::capacity_workspace(type, capacity));
  std::vector<int64_t> kept(N, -7), expected(N, -1);
  for (int64_t e = 0; e < E; ++e) {
    for (const int64_t slot : slots.best(e, weights.data(), limit)) expected[slot] = e;
  }
  cuda::apply_capacity(type, capacity, weights.data(), kept.data(), workspace.data(), nullptr);
  expect(kept == expected, name + ": capacity by weight");
  std::fill(expected.begin(), expected.end(), -1);
  std::vector<int64_t> used(E);
  for (int64_t k = 0; k < K; ++k) {
    for (int64_t slot = k; slot < N; slot += K) {
      if (ids[slot] >= 0 && used[ids[slot]]++ < limit) expected[slot] = ids[slot];
    }
  }
  cuda::apply_capacity(type, capacity, nullptr, kept.data(), workspace.data(), nullptr);
  expect(kept == expected, name + ": capacity by position");

  struct List {
    std::vector<int64_t> tokens, experts, slots;
    explicit List(int64_t size) : tokens(size, -7), experts(size, -7), slots(size, -7) {}
    int64_t size() const { return static_cast<int64_t>(tokens.size()); }
    cuda::PairList list() const { return {size(), tokens.data(), experts.data(), slots.data()}; }
    cuda::MutablePairList buffer() { return {size(), tokens.data(), experts.data(), slots.data()}; }
    void write(int64_t at, int64_t t, int64_t e, int64_t slot) {
      tokens[at] = t;
      experts[at] = e;
      slots[at] = slot;
    }
    bool operator==(const List& other) const {
      return tokens == other.tokens && experts == other.experts && slots == other.slots;
    }
  };
  std::vector<int64_t> counts(E);
  std::vector<double> noise(E, 0.3);
  for (int64_t e = 0; e < E; ++e) counts[e] = slots.count(e);
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
      const std::vector<int64_t> best = slots.best(e, weights.data(), count);
      moe_ext::cpu::Best<T> padding(std::max<int64_t>(count - counts[e], 0));
      for (int64_t t = 0; t < tokens; ++t) {
        bool is_candidate = false;
        for (int64_t k = 0; k < K; ++k) is_candidate = is_candidate || ids[t * K + k] >= 0;
        for (int64_t k = 0; k < K; ++k) is_candidate = is_candidate && ids[t * K + k] != e;
        if (is_candidate) padding.push(probs[t * E + e], t);
      }
      std::vector<std::pair<int64_t, int64_t>> both;
      for (const int64_t t : padding.take()) both.push_back({t, -1});
      for (const int64_t slot : best) {
        both.push_back({slot / K, slot});
        expected[slot] = e;
      }
      std::sort(both.begin(), both.end());
      for (const auto& [t, slot] : both) expected_pairs.write(at++, t, e, slot);
    }
    for (; at < N + E * M; ++at) expected_pairs.write(at, -1, -1, -1);
    cuda::round_tokens(
        type, {capacity, M, rounding, noise.data()}, probs.data(), weights.data(), pairs.buffer(),
        kept.data(), workspace.data(), nullptr);
    const std::string mode = ": rounding " + std::to_string(static_cast<int>(rounding));
    expect(kept == expected, name + mode + ", kept");
    expect(pairs == expected_pairs, name + mode);

    const std::vector<T> topk = randoms<T>(N, random), p = randoms<T>(tokens * E, random);
    std::vector<T> of_pair(pairs.tokens.size()), expected_weights(of_pair.size());
    cuda::pair_weights(type, topk.data(), p.data(), pairs.list(), E, 2, of_pair.data(), nullptr);
    const std::vector<T> grad = randoms<T>(of_pair.size(), random);
    std::vector<T> dw(N), dp(tokens * E), expected_dw(N), expected_dp(tokens * E);
    cuda::pair_weights_backward(
        type, grad.data(), pairs.list(), E, 2, dw.data(), dp.data(), nullptr);
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
    moe_ext::cpu::Best<T> best(share);
    for (int64_t t = 0; t < tokens; ++t) {
      if (mask[t]) best.push(probs[t * E + e], t);
    }
    for (const int64_t t : best.take()) expected_pairs.write(at++, t, e, -1);
  }
  for (; at < E * tokens; ++at) expected_pairs.write(at, -1, -1, -1);
  std::vector<char> small(cuda::expert_choice_workspace());
  cuda::expert_choice(
      type, probs.data(), mask.get(), tokens, E, K, pairs.buffer(), small.data(), nullptr);
  expect(pairs == expected_pairs, name + ": expert choice");
}

template <class T>
void test_router(
    int64_t tokens, int64_t E, int64_t K, int64_t groups, int64_t topk_groups, bool with_bias,
    bool few_values, std::mt19937& random) {
  constexpr bool kWide = sizeof(T) == 8;
  const double tolerance = kWide ? 1e-14 : 2e-6;
  const cpu::RouterKernels& twin = cpu::current().router[kWide ? 0 : 1];
  std::vector<T> logits = randoms<T>(tokens * E, random), bias = randoms<T>(E, random);
  for (T& z : logits) {
    if (few_values) z = static_cast<T>(std::round(z));  // many ties
    if (few_values && random() % 40 == 0) z = static_cast<T>(NAN);
  }
  const std::vector<T> grad_weights = randoms<T>(tokens * K, random);
  const std::vector<T> grad_probs = randoms<T>(tokens * E, random);
  for (const ScoreFunction score : {ScoreFunction::kSoftmax, ScoreFunction::kSigmoid}) {
    if (score == ScoreFunction::kSigmoid && groups > 1 && E / groups < 2) continue;
    for (const bool renormalize : {false, true}) {
      const std::string name =
          "router E " + std::to_string(E) + " K " + std::to_string(K) + " groups " +
          std::to_string(groups) + " renormalize " + std::to_string(renormalize) + " score " +
          std::to_string(static_cast<int>(score)) + " bytes " + std::to_string(sizeof(T));
      const cuda::RouterArgs args{
          kWide ? moe_ext::Type::kF64 : moe_ext::Type::kF32,
          tokens,
          E,
          K,
          score,
          renormalize,
          1.5,
          logits.data()};
      const cpu::RouterArgs twin_args{E, K, score, renormalize, 1.5, logits.data()};
      const T* bias_data = with_bias ? bias.data() : nullptr;
      std::vector<char> scratch(twin.scratch_bytes(E, K) + 64);
      std::vector<int64_t> ids(tokens * K, -7), expected_ids(tokens * K);
      expect(cuda::router_fits(args.type, E, K), name + ": fits");
      cuda::choose_experts(args, bias_data, groups, topk_groups, ids.data(), nullptr);
      twin.choose(
          twin_args, {bias_data, groups, topk_groups}, 0, tokens, expected_ids.data(),
          scratch.data());
      expect(ids == expected_ids, name + ": ids");
      for (size_t s = 0; s < ids.size(); s += 5) ids[s] = s % 2 ? -1 : E;  // some are skipped
      std::vector<T> weights(tokens * K), probs(tokens * E), expected_weights(tokens * K),
          expected_probs(tokens * E);
      cuda::router_weights(args, ids.data(), weights.data(), probs.data(), nullptr);
      twin.weights(
          twin_args, ids.data(), 0, tokens, expected_weights.data(), expected_probs.data());
      expect(error(weights, expected_weights) < tolerance, name + ": weights");
      expect(error(probs, expected_probs) < tolerance, name + ": probs");
      for (const int which : {1, 2, 3}) {
        const T* ds = which & 1 ? grad_weights.data() : nullptr;
        const T* dP = which & 2 ? grad_probs.data() : nullptr;
        std::vector<T> grad(tokens * E), expected(tokens * E);
        cuda::router_weights_backward(args, ids.data(), ds, dP, grad.data(), nullptr);
        twin.backward(twin_args, ids.data(), ds, dP, 0, tokens, expected.data(), scratch.data());
        expect(error(grad, expected) < 10 * tolerance, name + ": gradient");
      }
    }
  }
}

template <class T>
void test_losses(
    int64_t S, int64_t length, int64_t E, int64_t K, int masked, bool normalize, bool with_share,
    std::mt19937& random) {
  const std::string name = "losses S " + std::to_string(S) + " length " + std::to_string(length) +
                           " E " + std::to_string(E) + " masked " + std::to_string(masked) +
                           " bytes " + std::to_string(sizeof(T));
  const double tolerance = sizeof(T) == 8 ? 1e-13 : 1e-5;
  const int64_t tokens = S * length;
  const std::vector<int64_t> ids = make_ids(tokens * K, E, 2, random);
  const std::vector<T> logits = randoms<T>(tokens * E, random);
  std::vector<T> probs(tokens * E);
  for (T& p : probs) p = static_cast<T>(random() % 1000) / 1000;
  std::vector<double> share(E);
  for (double& f : share) f = static_cast<double>(random() % 1000) / 1000;
  std::unique_ptr<bool[]> mask(new bool[tokens + 1]);
  for (int64_t t = 0; t < tokens; ++t) {
    mask[t] = masked == 2 ? false : masked == 1 && t < length ? false : random() % 3 > 0;
  }
  const auto used = [&](int64_t t) { return masked == 0 || mask[t]; };

  std::vector<char> workspace(cuda::loss_workspace(S, E) + 64);
  const cuda::LossArgs args{
      sizeof(T) == 8 ? moe_ext::Type::kF64 : moe_ext::Type::kF32, tokens, E,
      masked == 0 ? nullptr : mask.get(), workspace.data()};
  std::vector<T> loss(1), z_loss(1), entropy(1), row(S * E), grad_probs(tokens * E),
      grad_logits(tokens * E);
  const T g = static_cast<T>(3);
  cuda::load_balancing_loss(
      args, probs.data(), cuda::IdType::kI64, ids.data(), K, normalize, S,
      with_share ? share.data() : nullptr, row.data(), loss.data(), nullptr);
  cuda::load_balancing_loss_backward(args, &g, row.data(), S, grad_probs.data(), nullptr);
  cuda::router_z_loss(args, logits.data(), z_loss.data(), nullptr);
  cuda::router_z_loss_backward(args, &g, logits.data(), grad_logits.data(), nullptr);
  cuda::router_entropy(args, probs.data(), entropy.data(), nullptr);

  int64_t all = 0, sequences = 0;
  std::vector<double> f(S * E), mean(S * E), count(S);
  for (int64_t t = 0; t < tokens; ++t) count[t / length] += used(t);
  for (const double n : count) {
    all += static_cast<int64_t>(n);
    sequences += n > 0;
  }
  double expected_z = 0, expected_entropy = 0, expected_loss = 0;
  std::vector<T> expected_grad_probs(tokens * E), expected_grad_logits(tokens * E);
  for (int64_t t = 0; t < tokens; ++t) {
    if (!used(t)) continue;
    const int64_t s = t / length;
    double sum = 0;
    for (int64_t e = 0; e < E; ++e) {
      const double p = probs[t * E + e];
      mean[s * E + e] += p / count[s];
      expected_entropy -= p > 0 ? p * std::log(p) / all : 0;
      sum += std::exp(static_cast<double>(logits[t * E + e]));
    }
    const double lse = std::log(sum);
    expected_z += lse * lse / all;
    for (int64_t e = 0; e < E; ++e) {
      const double p = std::exp(static_cast<double>(logits[t * E + e])) / sum;
      expected_grad_logits[t * E + e] = static_cast<T>(3 * 2 * lse * p / all);
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
  for (int64_t i = 0; i < tokens * E; ++i) {
    const int64_t t = i / E, s = t / length;
    if (used(t)) expected_grad_probs[i] = static_cast<T>(3 * f[s * E + i % E] / count[s]);
  }
  const auto one = [](double x) { return std::vector<T>{static_cast<T>(x)}; };
  expect(error(loss, one(expected_loss)) < tolerance, name + ": load balancing");
  expect(error(grad_probs, expected_grad_probs) < tolerance, name + ": its gradient");
  expect(error(z_loss, one(expected_z)) < tolerance, name + ": z");
  expect(error(grad_logits, expected_grad_logits) < tolerance, name + ": its gradient");
  expect(error(entropy, one(expected_entropy)) < tolerance, name + ": entropy");
}

}  // namespace

int main() {
  std::mt19937 random(1);
  for (const int kind : {0, 1, 2, 3}) {
    for (const int64_t N : {0, 1, 40, 700}) test_plan(N, 9, kind, random);
    for (const int64_t H : {1, 8, 33, 600}) {
      for (const int64_t offset : {0, 1}) {
        test_rows<double>(moe_ext::Type::kF64, 19, 3, 5, H, offset, kind, 1e-14, random);
        test_rows<float>(moe_ext::Type::kF32, 19, 3, 5, H, offset, kind, 1e-6, random);
        test_rows<BFloat16>(moe_ext::Type::kBf16, 19, 3, 5, H, offset, kind, 1.0 / 128, random);
        test_rows<Half>(moe_ext::Type::kF16, 19, 3, 5, H, offset, kind, 1.0 / 1024, random);
      }
    }
  }
  struct Sizes {
    int64_t N, K, offset;
  };
  for (const bool k_dense : {true, false}) {
    for (const auto& [N, K, offset] : {Sizes{1, 1, 1}, {24, 40, 0}, {130, 19, 1}}) {
      test_products<double>(moe_ext::Type::kF64, false, N, K, k_dense, offset, 1e-14, random);
      test_products<float>(moe_ext::Type::kF32, false, N, K, k_dense, offset, 1e-5, random);
      test_products<float>(moe_ext::Type::kF32, true, N, K, k_dense, offset, 1.0 / 1024, random);
      test_products<BFloat16>(
          moe_ext::Type::kBf16, false, N, K, k_dense, offset, 1.0 / 128, random);
      test_products<Half>(moe_ext::Type::kF16, false, N, K, k_dense, offset, 1.0 / 1024, random);
    }
  }
  for (int i = 0; i < 7; ++i) {
    const auto activation = static_cast<moe_ext::Activation>(i);
    for (const bool gated : {true, false}) {
      if (activation == moe_ext::Activation::kSwigluClamped && !gated) continue;
      const int64_t offset = i % 2, I = i % 3 == 0 ? 1100 : 24;
      test_experts<double>(
          moe_ext::Type::kF64, activation, gated, 10, 33, gated, offset, 1e-13, random);
      if (i % 2) {
        test_experts<BFloat16>(
            moe_ext::Type::kBf16, activation, gated, I, 40, gated, 0, 1.0 / 128, random);
        test_experts<Half>(
            moe_ext::Type::kF16, activation, gated, 7, 40, !gated, 1, 1.0 / 1024, random);
      } else {
        test_experts<float>(moe_ext::Type::kF32, activation, gated, I, 40, gated, 0, 1e-5, random);
      }
    }
  }
  for (const bool few_values : {false, true}) {
    test_pairs<float>(1, 1, 1, 1, 1.0, few_values, random);
    test_pairs<float>(300, 2, 5, 16, 0.7, few_values, random);
    test_pairs<double>(600, 3, 40, 8, 1.2, few_values, random);
    test_pairs<float>(513, 6, 7, 64, INFINITY, few_values, random);
    test_pairs<double>(70, 4, 4, 32, 0.01, few_values, random);
  }
  for (const bool few_values : {false, true}) {
    for (const bool with_bias : {false, true}) {
      test_router<float>(7, 1, 1, 1, 1, with_bias, few_values, random);
      test_router<float>(9, 8, 2, 1, 1, with_bias, few_values, random);
      test_router<double>(9, 33, 33, 1, 1, with_bias, few_values, random);
      test_router<float>(9, 64, 8, 8, 3, with_bias, few_values, random);
      test_router<double>(6, 12, 2, 6, 2, with_bias, few_values, random);
      test_router<float>(5, 35, 4, 35, 5, with_bias, few_values, random);
      test_router<float>(5, 1000, 21, 4, 3, with_bias, few_values, random);
    }
  }
  for (const int masked : {0, 1, 2}) {
    test_losses<double>(1, 0, 4, 2, masked, true, false, random);
    test_losses<double>(1, 1, 1, 1, masked, true, false, random);
    test_losses<double>(1, 90, 33, 2, masked, false, false, random);
    test_losses<float>(1, 90, 8, 3, masked, true, true, random);
    test_losses<float>(3, 40, 40, 2, masked, true, false, random);
  }
  std::printf("%d failures\n", failures);
  return failures != 0;
}
