// The CUDA kernels on the host, against the CPU's: `make test-kernels`. What only a GPU can show
// (that nvcc's code does the same, races between blocks, speed) is not tested here. The Makefile
// puts cuda_emulation.h before everything.
#include <cstdio>
#include <random>
#include <string>

#include "cpu/kernels/kernels.h"
#include "cuda/kernels/aux_loss.cu"
#include "cuda/kernels/plan.cu"
#include "cuda/kernels/router.cu"
#include "cuda/kernels/unpermute.cu"

namespace {

using moe_ext::ScoreFunction;
namespace cpu = moe_ext::kernels;
namespace cuda = moe_ext::cuda;

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
      cuda::IdType::kI64, ids.data(), N, E, p.row_map.data(), p.offsets.data(),
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
  const std::vector<int32_t> narrow(ids.begin(), ids.end());
  cuda::count_experts(cuda::IdType::kI32, narrow.data(), N, E, counts.data(), nullptr);
  expect(counts == expected_counts, name + ": counts");
}

// Through permute, unpermute and its backward in a storage type, against sums in double.
template <class T>
void test_rows(
    cuda::Type type, int64_t tokens, int64_t K, int64_t E, int64_t H, int64_t offset, int kind,
    double tolerance, std::mt19937& random) {
  const std::string name = "rows of type " + std::to_string(static_cast<int>(type)) + ", H " +
                           std::to_string(H) + ", kind " + std::to_string(kind);
  using C = cuda::Compute<T>;
  const int64_t N = tokens * K;
  const std::vector<int64_t> ids = make_ids(N, E, kind, random);
  const PlanOf p = plan(ids, E);
  const auto stored = [&](int64_t count, std::vector<double>& values) {
    values = randoms<double>(count, random);
    std::vector<T> data(count + offset);
    for (int64_t i = 0; i < count; ++i) {
      data[offset + i] = cuda::narrow<T>(static_cast<C>(values[i]));
      values[i] = cuda::widen(data[offset + i]);
    }
    return data;
  };
  const auto widened = [&](const std::vector<T>& data) {
    std::vector<double> values;
    for (size_t i = offset; i < data.size(); ++i) values.push_back(cuda::widen(data[i]));
    return values;
  };
  std::vector<double> x, g;
  const std::vector<T> tokens_data = stored(tokens * H, x), grad_data = stored(tokens * H, g);
  const std::vector<C> weights = randoms<C>(N, random);

  std::vector<T> rows(N * H + offset), out(tokens * H + offset);
  cuda::gather_rows(
      type, tokens_data.data() + offset, p.slot_of_row.data(), &p.offsets[E], N, K, H,
      rows.data() + offset, nullptr);
  cuda::unpermute(
      type, rows.data() + offset, p.row_map.data(), weights.data(), tokens, K, H,
      out.data() + offset, nullptr);
  std::vector<double> expected_rows(N * H), expected_out(tokens * H), expected_grad(N * H);
  std::vector<C> expected_weights(N), grad_weights(N, C(-7));
  for (int64_t s = 0; s < N; ++s) {
    const int64_t row = p.row_map[s], t = s / K;
    if (row < 0) continue;
    double dot = 0;
    for (int64_t h = 0; h < H; ++h) {
      expected_rows[row * H + h] = x[t * H + h];
      expected_out[t * H + h] += static_cast<double>(weights[s]) * x[t * H + h];
      expected_grad[row * H + h] = static_cast<double>(weights[s]) * g[t * H + h];
      dot += g[t * H + h] * x[t * H + h];
    }
    expected_weights[s] = static_cast<C>(dot);
  }
  expect(error(widened(rows), expected_rows) == 0, name + ": permuted");
  expect(error(widened(out), expected_out) < tolerance, name + ": unpermuted");
  std::vector<T> grad_rows(N * H + offset);
  cuda::unpermute_backward(
      type, grad_data.data() + offset, rows.data() + offset, p.row_map.data(), weights.data(),
      tokens, K, H, grad_rows.data() + offset, grad_weights.data(), nullptr);
  expect(error(widened(grad_rows), expected_grad) < tolerance, name + ": grad_rows");
  expect(error(grad_weights, expected_weights) < 1e-5, name + ": grad_weights");
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
      const cuda::RouterArgs args{kWide ? cuda::Type::kF64 : cuda::Type::kF32,
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
      sizeof(T) == 8 ? cuda::Type::kF64 : cuda::Type::kF32, tokens, E,
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
        test_rows<double>(cuda::Type::kF64, 19, 3, 5, H, offset, kind, 1e-14, random);
        test_rows<float>(cuda::Type::kF32, 19, 3, 5, H, offset, kind, 1e-6, random);
        test_rows<BFloat16>(cuda::Type::kBf16, 19, 3, 5, H, offset, kind, 1.0 / 128, random);
        test_rows<Half>(cuda::Type::kF16, 19, 3, 5, H, offset, kind, 1.0 / 1024, random);
      }
    }
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
