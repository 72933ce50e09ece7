// The CPU kernels without torch, for the sanitizers: every piece on every instruction set, at odd
// sizes, on buffers that end where the data ends, against sums in double. `make test-kernels`.
//
// With an argument N, pieces are run by N threads, which is what the thread sanitizer is to watch.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "common/token_rounding.h"
#include "cpu/kernels/kernels.h"
#include "cpu/select.h"

using namespace moe_ext::kernels;
using moe_ext::Activation;
using moe_ext::Type;

namespace {

int num_threads = 1;
int failures = 0;

// Runs piece(i, scratch) for i in [0, count), by several threads if asked for.
void run(int64_t count, int64_t scratch_bytes, const std::function<void(int64_t, void*)>& piece) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    std::unique_ptr<void, decltype(&std::free)> scratch(
        std::aligned_alloc(64, (scratch_bytes + 63) / 64 * 64 + 64), &std::free);
    for (int64_t i; (i = next.fetch_add(1)) < count;) piece(i, scratch.get());
  };
  std::vector<std::thread> threads;
  for (int t = 1; t < num_threads; ++t) threads.emplace_back(work);
  work();
  for (std::thread& thread : threads) thread.join();
}

// Numbers of a storage type, exactly as many bytes as they need, and the same numbers as double.
class Buffer {
 public:
  Buffer(Type type, int64_t count) : type_(type), data_(count * size()), values(count) {}
  Buffer(Type type, int64_t count, std::mt19937& random, double scale) : Buffer(type, count) {
    std::normal_distribution<double> normal(0, scale);
    for (int64_t i = 0; i < count; ++i) put(i, normal(random));
    read();
  }
  int64_t size() const { return type_ == Type::kF64 ? 8 : type_ == Type::kF32 ? 4 : 2; }
  void* data() { return data_.data(); }

  // Values come from what is stored.
  void read() {
    for (size_t i = 0; i < values.size(); ++i) values[i] = get(i);
  }

 private:
  void put(int64_t i, double x) {
    const float narrow = static_cast<float>(x);
    uint32_t bits;
    std::memcpy(&bits, &narrow, 4);
    if (type_ == Type::kF64) {
      std::memcpy(&data_[i * 8], &x, 8);
    } else if (type_ == Type::kF32) {
      std::memcpy(&data_[i * 4], &narrow, 4);
    } else {  // cut off: any number of the type will do
      const uint16_t half = type_ == Type::kBf16
                                ? bits >> 16
                                : (bits >> 16 & 0x8000) | ((bits & 0x7fffffff) - 0x38000000) >> 13;
      const uint16_t small = std::fabs(x) < 1e-3 ? 0 : half;
      std::memcpy(&data_[i * 2], &small, 2);
    }
  }
  double get(int64_t i) const {
    if (type_ == Type::kF64) {
      double x;
      std::memcpy(&x, &data_[i * 8], 8);
      return x;
    }
    if (type_ == Type::kF32) {
      float x;
      std::memcpy(&x, &data_[i * 4], 4);
      return x;
    }
    uint16_t half;
    std::memcpy(&half, &data_[i * 2], 2);
    if (type_ == Type::kBf16) {
      const uint32_t bits = static_cast<uint32_t>(half) << 16;
      float x;
      std::memcpy(&x, &bits, 4);
      return x;
    }
    const int exponent = half >> 10 & 31;
    const double mantissa = (half & 1023) + (exponent ? 1024 : 0);
    return std::ldexp(mantissa, std::max(exponent, 1) - 25) * (half & 0x8000 ? -1 : 1);
  }

  Type type_;
  std::vector<char> data_;

 public:
  std::vector<double> values;
};

void check(
    const std::string& what, Type type, Buffer& actual, const std::vector<double>& expected) {
  const double tolerance[] = {1e-12, 1e-5, 0x1p-6, 0x1p-9};
  actual.read();
  double error = 0, largest = 1e-30;
  for (size_t i = 0; i < expected.size(); ++i) {
    error = std::max(error, std::fabs(actual.values[i] - expected[i]));
    largest = std::max(largest, std::fabs(expected[i]));
    if (std::isnan(actual.values[i])) error = INFINITY;
  }
  if (!(error / largest <= tolerance[static_cast<int>(type)])) {
    std::printf("FAILED %s %s: error %g\n", current().isa, what.c_str(), error / largest);
    ++failures;
  }
}

double silu(double x) { return x / (1 + std::exp(-x)); }

// A layer of two experts, the first with `rows`, the second with 5; tokens are gathered.
void test_layer(Type type, int64_t rows, int64_t H, int64_t I, bool transposed) {
  std::mt19937 random(1);
  const TypeKernels& kernels = current().type[static_cast<int>(type)];
  const int64_t N = rows + 5, T = N / 2 + 1, W = 2 * I, E = 2;
  const std::string name = "type " + std::to_string(static_cast<int>(type)) + " rows " +
                           std::to_string(rows) + " H " + std::to_string(H) + " I " +
                           std::to_string(I) + (transposed ? " transposed" : "");
  std::vector<int32_t> token(N);
  for (int64_t r = 0; r < N; ++r) token[r] = static_cast<int32_t>(r < rows ? r * T / rows : r % T);
  std::sort(token.begin() + rows, token.end());
  Buffer x(type, T * H, random, 1), grad(type, T * H, random, 1);
  Buffer up_weights(type, E * W * H, random, 1 / std::sqrt(H));
  Buffer down_weights(type, E * H * I, random, 1 / std::sqrt(I));
  Buffer up_bias(type, E * W, random, 1), down_bias(type, E * H, random, 1);
  const Type compute = type == Type::kF64 ? Type::kF64 : Type::kF32;
  Buffer row_weight(compute, N, random, 1);
  const auto expert_of = [&](int64_t r) { return r < rows ? 0 : 1; };
  // Element (n, k) of an expert's [n_count, k_count] matrix.
  const auto at = [&](int64_t e, int64_t n, int64_t k, int64_t n_count, int64_t k_count) {
    return e * n_count * k_count + (transposed ? k * n_count + n : n * k_count + k);
  };
  const auto weights = [&](Buffer& buffer, int64_t n_count, int64_t k_count) {
    return transposed ? Weights{buffer.data(), n_count * k_count, 1, n_count}
                      : Weights{buffer.data(), n_count * k_count, k_count, 1};
  };
  const auto offset = [&](Buffer& buffer, int64_t elements) {
    return static_cast<char*>(buffer.data()) + elements * buffer.size();
  };

  std::vector<RowChunk> chunks, experts{{0, 0, rows}, {1, rows, N}};
  for (const RowChunk& expert : experts) {
    for (int64_t begin = expert.begin; begin < expert.end; begin += kernels.max_chunk_rows) {
      chunks.push_back(
          {expert.expert, begin, std::min(begin + kernels.max_chunk_rows, expert.end)});
    }
  }
  const int64_t scratch =
      kernels.scratch_bytes(
          std::min(std::max<int64_t>(rows, 5), kernels.max_chunk_rows), std::max(H, W), kMaxParts) +
      (T + 1) * kMaxParts * kPieceCols * 8;

  // Forward.
  Buffer hidden(type, N * W), activated(type, N * I), out(type, T * H);
  const Weights gate = weights(up_weights, W, H);
  Weights up = gate;
  up.data = offset(up_weights, I * gate.n_stride);
  const UpArgs up_args{
      H,
      I,
      Activation::kSilu,
      true,
      {x.data(), H, token.data()},
      gate,
      up,
      {up_bias.data(), W},
      {offset(up_bias, I), W},
      hidden.data(),
      activated.data()};
  const int64_t up_cols = (W + kPieceCols - 1) / kPieceCols;
  run(chunks.size() * up_cols, scratch, [&](int64_t i, void* s) {
    const int64_t col = i % up_cols;
    kernels.up(up_args, chunks[i / up_cols], col, col + 1 < up_cols, s);
  });
  std::vector<double> expected_hidden(N * W), expected_activated(N * I);
  for (int64_t r = 0; r < N; ++r) {
    const int64_t e = expert_of(r);
    for (int64_t w = 0; w < W; ++w) {
      double sum = up_bias.values[e * W + w];
      for (int64_t h = 0; h < H; ++h) {
        sum += x.values[token[r] * H + h] * up_weights.values[at(e, w, h, W, H)];
      }
      expected_hidden[r * W + w] = sum;
    }
    for (int64_t i = 0; i < I; ++i) {
      expected_activated[r * I + i] =
          silu(expected_hidden[r * W + i]) * expected_hidden[r * W + I + i];
    }
  }
  check(name + " hidden", type, hidden, expected_hidden);
  check(name + " activated", type, activated, expected_activated);

  const CombineArgs combine_args{
      I,
      H,
      {activated.data(), I, nullptr},
      weights(down_weights, H, I),
      {down_bias.data(), H},
      token.data(),
      row_weight.data(),
      out.data(),
      1};
  // Two blocks of tokens.
  std::vector<RowChunk> block_chunks;
  std::vector<TokenBlock> blocks;
  for (const int64_t begin : {int64_t{0}, T / 2}) {
    const int64_t end = begin == 0 ? T / 2 : T;
    const int64_t first = block_chunks.size();
    for (const RowChunk& chunk : chunks) {
      const auto edge = [&](int64_t t) {
        return std::lower_bound(token.begin() + chunk.begin, token.begin() + chunk.end, t) -
               token.begin();
      };
      if (edge(begin) < edge(end)) block_chunks.push_back({chunk.expert, edge(begin), edge(end)});
    }
    blocks.push_back({begin, end, first, static_cast<int64_t>(block_chunks.size())});
  }
  const auto run_combine = [&](const CombineArgs& args) {
    const int64_t pitch = args.parts * kPieceCols;
    const int64_t cols = (args.N + pitch - 1) / pitch;
    run(2 * cols, scratch, [&](int64_t i, void* s) {
      const int64_t col = i % cols;
      kernels.combine(args, block_chunks.data(), blocks[i / cols], col, col + 1 < cols, s);
    });
  };
  run_combine(combine_args);
  std::vector<double> expected_out(T * H);
  for (int64_t r = 0; r < N; ++r) {
    const int64_t e = expert_of(r);
    for (int64_t h = 0; h < H; ++h) {
      double sum = down_bias.values[e * H + h];
      for (int64_t i = 0; i < I; ++i) {
        sum += activated.values[r * I + i] * down_weights.values[at(e, h, i, H, I)];
      }
      expected_out[token[r] * H + h] += row_weight.values[r] * sum;
    }
  }
  check(name + " out", type, out, expected_out);

  // Backward, from the pre-activation as it was stored.
  for (const int64_t parts : {int64_t{1}, kMaxParts}) {
    const int64_t i_cols = (I + kPieceCols - 1) / kPieceCols;
    Buffer grad_hidden(type, N * W), weighted(type, N * I), grad_parts(compute, i_cols * N);
    Weights down = weights(down_weights, H, I);
    std::swap(down.n_stride, down.k_stride);
    const GradHiddenArgs hidden_args{
        H,
        I,
        N,
        Activation::kSilu,
        true,
        {grad.data(), H, token.data()},
        down,
        {down_bias.data(), H},
        hidden.data(),
        row_weight.data(),
        grad_hidden.data(),
        weighted.data(),
        grad_parts.data(),
        parts};
    const int64_t cols = (I + parts * kPieceCols - 1) / (parts * kPieceCols);
    run(chunks.size() * cols, scratch, [&](int64_t i, void* s) {
      const int64_t col = i % cols;
      kernels.grad_hidden(hidden_args, chunks[i / cols], col, col + 1 < cols, s);
    });
    grad_parts.read();
    std::vector<double> expected_grad(N * W), expected_weighted(N * I), expected_parts(N);
    for (int64_t r = 0; r < N; ++r) {
      const int64_t e = expert_of(r);
      const double* g = &grad.values[token[r] * H];
      for (int64_t h = 0; h < H; ++h) {
        expected_parts[r] += g[h] * down_bias.values[e * H + h];
      }
      for (int64_t i = 0; i < I; ++i) {
        double d = 0;
        for (int64_t h = 0; h < H; ++h) d += g[h] * down_weights.values[at(e, h, i, H, I)];
        const double a = hidden.values[r * W + i], b = hidden.values[r * W + I + i];
        const double s = 1 / (1 + std::exp(-a));
        expected_parts[r] += d * silu(a) * b;
        expected_weighted[r * I + i] = row_weight.values[r] * silu(a) * b;
        d *= row_weight.values[r];
        expected_grad[r * W + i] = d * b * s * (1 + a * (1 - s));
        expected_grad[r * W + I + i] = d * silu(a);
      }
    }
    check(name + " grad_hidden", type, grad_hidden, expected_grad);
    check(name + " weighted", type, weighted, expected_weighted);
    for (int64_t r = 0; r < N; ++r) {
      for (int64_t col = 1; col < i_cols; ++col) {
        grad_parts.values[r] += grad_parts.values[col * N + r];
      }
    }
    double error = 0, largest = 0;
    for (int64_t r = 0; r < N; ++r) {
      error = std::max(error, std::fabs(grad_parts.values[r] - expected_parts[r]));
      largest = std::max(largest, std::fabs(expected_parts[r]));
    }
    if (!(error <= 1e-5 * largest)) {
      std::printf("FAILED %s %s grad_weight_parts: %g\n", current().isa, name.c_str(), error);
      ++failures;
    }

    Weights back = gate;
    std::swap(back.n_stride, back.k_stride);
    Buffer grad_x(type, T * H);
    run_combine(
        {W,
         H,
         {grad_hidden.data(), W, nullptr},
         back,
         {nullptr, 0},
         token.data(),
         nullptr,
         grad_x.data(),
         parts});
    std::vector<double> expected_x(T * H);
    for (int64_t r = 0; r < N; ++r) {
      for (int64_t w = 0; w < W; ++w) {
        for (int64_t h = 0; h < H; ++h) {
          expected_x[token[r] * H + h] +=
              grad_hidden.values[r * W + w] * up_weights.values[at(expert_of(r), w, h, W, H)];
        }
      }
    }
    check(name + " grad_x", type, grad_x, expected_x);

    if (parts > 1) continue;
    experts.push_back({2, N, N});  // an idle expert
    Buffer grad_up(type, 3 * W * H), sums(type, 3 * W);
    const GradWeightsArgs grad_args{W,
                                    H,
                                    {grad_hidden.data(), W, nullptr},
                                    {x.data(), H, token.data()},
                                    grad_up.data(),
                                    rows % 2 == 0};
    const int64_t m_blocks = (W + kGradRows - 1) / kGradRows;
    const int64_t n_blocks = (H + kGradCols - 1) / kGradCols;
    run(3 * m_blocks * n_blocks, kernels.grad_scratch_bytes(std::max<int64_t>(rows, 5)),
        [&](int64_t i, void* s) {
          kernels.grad_weights(
              grad_args, experts[i / n_blocks / m_blocks], i / n_blocks % m_blocks, i % n_blocks,
              s);
        });
    const ColumnSumArgs sum_args{
        W, {grad_hidden.data(), W, nullptr}, row_weight.data(), sums.data()};
    const int64_t w_cols = (W + kPieceCols - 1) / kPieceCols;
    run(3 * w_cols, 64,
        [&](int64_t i, void*) { kernels.column_sum(sum_args, experts[i / w_cols], i % w_cols); });
    experts.pop_back();
    std::vector<double> expected_up(3 * W * H), expected_sums(3 * W);
    for (int64_t r = 0; r < N; ++r) {
      const int64_t e = expert_of(r);
      for (int64_t w = 0; w < W; ++w) {
        const double d = grad_hidden.values[r * W + w];
        expected_sums[e * W + w] += row_weight.values[r] * d;
        for (int64_t h = 0; h < H; ++h) {
          expected_up[(e * W + w) * H + h] += d * x.values[token[r] * H + h];
        }
      }
    }
    check(name + " grad_up", type, grad_up, expected_up);
    check(name + " sums", type, sums, expected_sums);
  }
}

// Routing of T tokens: choice, weights and their gradient, and the losses.
void test_router(Type type, int64_t T, int64_t E, int64_t K, int64_t groups) {
  std::mt19937 random(2);
  const RouterKernels& kernels = current().router[type == Type::kF64 ? 0 : 1];
  const int64_t topk_groups = (groups + 1) / 2;
  for (const auto score : {moe_ext::ScoreFunction::kSoftmax, moe_ext::ScoreFunction::kSigmoid}) {
    const bool softmax = score == moe_ext::ScoreFunction::kSoftmax;
    const std::string name = "router type " + std::to_string(static_cast<int>(type)) + " E " +
                             std::to_string(E) + " K " + std::to_string(K) +
                             (softmax ? " softmax" : " sigmoid");
    Buffer logits(type, T * E, random, 1), bias(type, E, random, 0.1);
    Buffer weights(type, T * K), probs(type, T * E), grad_logits(type, T * E);
    Buffer grad_weights(type, T * K, random, 1), grad_probs(type, T * E, random, 1);
    std::vector<int64_t> ids(T * K);
    const RouterArgs args{E, K, score, true, 2.0, logits.data()};
    const ChoiceArgs choice{groups > 1 ? bias.data() : nullptr, groups, topk_groups};
    const int64_t scratch = kernels.scratch_bytes(E, K);
    run(T, scratch, [&](int64_t t, void* s) {
      kernels.choose(args, choice, t, t + 1, ids.data(), s);
      kernels.weights(args, ids.data(), t, t + 1, weights.data(), probs.data());
      kernels.backward(
          args, ids.data(), grad_weights.data(), grad_probs.data(), t, t + 1, grad_logits.data(),
          s);
    });
    std::vector<double> expected_weights(T * K), expected_probs(T * E), expected_grad(T * E);
    double expected_squares = 0, expected_dots = 0;
    for (int64_t t = 0; t < T; ++t) {
      const double* z = &logits.values[t * E];
      const auto value = [&](int64_t e) {
        return softmax ? std::exp(z[e]) : 1 / (1 + std::exp(-z[e]));
      };
      double all = 0, chosen = 0, exps = 0, mean_probs = 0, mean_weights = 0;
      for (int64_t e = 0; e < E; ++e) {
        all += value(e);
        exps += std::exp(z[e]);
      }
      expected_squares += std::log(exps) * std::log(exps);
      for (int64_t k = 0; k < K; ++k) chosen += value(ids[t * K + k]);
      for (int64_t e = 0; e < E; ++e) {
        expected_probs[t * E + e] = value(e) / all;
        expected_dots += value(e) / all * bias.values[e];
        mean_probs += value(e) / all * grad_probs.values[t * E + e];
      }
      for (int64_t k = 0; k < K; ++k) {
        expected_weights[t * K + k] = 2 * value(ids[t * K + k]) / chosen;
        mean_weights += value(ids[t * K + k]) / chosen * grad_weights.values[t * K + k];
      }
      // d value / dz: value itself, or value (1 - value).
      const auto slope = [&](int64_t e) { return value(e) * (softmax ? 1 : 1 - value(e)); };
      for (int64_t e = 0; e < E; ++e) {
        expected_grad[t * E + e] = slope(e) / all * (grad_probs.values[t * E + e] - mean_probs);
      }
      for (int64_t k = 0; k < K; ++k) {
        const int64_t e = ids[t * K + k];
        expected_grad[t * E + e] +=
            2 * slope(e) / chosen * (grad_weights.values[t * K + k] - mean_weights);
      }
      // Without groups: best first, and no expert left out is better than the last.
      if (groups > 1) continue;
      const int64_t* best = &ids[t * K];
      bool sorted = true;
      for (int64_t k = 1; k < K; ++k) sorted &= z[best[k - 1]] >= z[best[k]];
      int64_t better = 0;
      for (int64_t e = 0; e < E; ++e) better += z[e] > z[best[K - 1]];
      if (!sorted || better > K - 1) {
        std::printf("FAILED %s %s: token %d\n", current().isa, name.c_str(), static_cast<int>(t));
        ++failures;
      }
    }
    check(name + " weights", type, weights, expected_weights);
    check(name + " probs", type, probs, expected_probs);
    check(name + " grad", type, grad_logits, expected_grad);

    std::unique_ptr<bool[]> mask(new bool[T]);
    std::fill_n(mask.get(), T, true);
    std::vector<char> buffer(scratch);
    Buffer losses(Type::kF64, 2), grad_z(type, T * E);
    const double sums[] = {
        kernels.z_loss(logits.data(), E, mask.get(), 0, T, buffer.data()),
        kernels.sum_dots(probs.data(), bias.data(), E, nullptr, 0, T)};
    std::memcpy(losses.data(), sums, sizeof(sums));
    losses.read();
    const double largest = std::max(expected_squares, std::fabs(expected_dots));
    if (std::fabs(losses.values[0] - expected_squares) > 1e-5 * largest ||
        std::fabs(losses.values[1] - expected_dots) > 1e-5 * largest) {
      std::printf("FAILED %s %s: losses\n", current().isa, name.c_str());
      ++failures;
    }
    mask[T - 1] = false;
    kernels.z_loss_backward(logits.data(), E, mask.get(), 0.5, 0, T, grad_z.data());
    std::vector<double> expected_z(T * E);
    for (int64_t t = 0; t + 1 < T; ++t) {
      double exps = 0;
      for (int64_t e = 0; e < E; ++e) exps += std::exp(logits.values[t * E + e]);
      for (int64_t e = 0; e < E; ++e) {
        expected_z[t * E + e] = std::log(exps) * std::exp(logits.values[t * E + e]) / exps;
      }
    }
    check(name + " z loss", type, grad_z, expected_z);
  }
}

// Rows of tokens back to their tokens; the last slot is skipped and one row belongs to none.
void test_unpermute(Type type, int64_t T, int64_t K, int64_t H) {
  std::mt19937 random(3);
  const TypeKernels& kernels = current().type[static_cast<int>(type)];
  const Type compute = type == Type::kF64 ? Type::kF64 : Type::kF32;
  const int64_t N = T * K;
  std::vector<int32_t> row_map(N), slot_of_row(N);
  for (int64_t slot = 0; slot < N; ++slot) row_map[slot] = static_cast<int32_t>(N - 1 - slot);
  row_map[N - 1] = -1;
  for (int64_t r = 0; r < N; ++r) slot_of_row[r] = r == 0 ? -1 : static_cast<int32_t>(N - 1 - r);
  Buffer rows(type, N * H, random, 1), weights(compute, N, random, 1), out(type, T * H);
  Buffer grad(type, T * H, random, 1), grad_rows(type, N * H), grad_weights(compute, N);
  const UnpermuteArgs args{K, H, rows.data(), row_map.data(), weights.data(), out.data()};
  const UnpermuteGradArgs grad_args{
      K,
      H,
      grad.data(),
      rows.data(),
      slot_of_row.data(),
      weights.data(),
      grad_rows.data(),
      grad_weights.data()};
  run(T, 0, [&](int64_t t, void*) { kernels.unpermute(args, t, t + 1); });
  run(N, 0, [&](int64_t r, void*) { kernels.unpermute_backward(grad_args, r, r + 1); });
  std::vector<double> expected(T * H), expected_rows(N * H), expected_weights(N);
  for (int64_t slot = 0; slot + 1 < N; ++slot) {
    const int64_t r = row_map[slot], t = slot / K;
    for (int64_t h = 0; h < H; ++h) {
      expected[t * H + h] += weights.values[slot] * rows.values[r * H + h];
      expected_rows[r * H + h] = weights.values[slot] * grad.values[t * H + h];
      expected_weights[slot] += grad.values[t * H + h] * rows.values[r * H + h];
    }
  }
  const std::string name =
      "unpermute type " + std::to_string(static_cast<int>(type)) + " H " + std::to_string(H);
  check(name, type, out, expected);
  check(name + " grad_rows", type, grad_rows, expected_rows);
  check(name + " grad_weights", compute, grad_weights, expected_weights);
}

// The choices of capacity, token rounding and expert choice, against sorts.
void test_selection(int64_t num_slots, int64_t E, int64_t M, std::mt19937& random) {
  const auto fail = [&](const char* what) {
    std::printf("selection of %ld slots, %ld experts: %s\n", (long)num_slots, (long)E, what);
    ++failures;
  };
  std::vector<int64_t> ids(num_slots);
  std::vector<float> keys(num_slots);
  for (int64_t s = 0; s < num_slots; ++s) {
    ids[s] = static_cast<int64_t>(random() % (E + 2)) - 1;
    keys[s] = random() % 9 == 0 ? NAN : static_cast<float>(random() % 5);  // many ties
  }
  const moe_ext::cpu::SlotsByExpert slots(ids.data(), num_slots, E);
  std::vector<int64_t> counts(E);
  for (int64_t e = 0; e < E; ++e) {
    std::vector<int64_t> expected;
    for (int64_t s = 0; s < num_slots; ++s) {
      if (ids[s] == e) expected.push_back(s);
    }
    counts[e] = slots.count(e);
    if (counts[e] != static_cast<int64_t>(expected.size())) fail("count");
    std::stable_sort(expected.begin(), expected.end(), [&](int64_t a, int64_t b) {
      return (keys[a] == keys[a] ? keys[a] : -INFINITY) >
             (keys[b] == keys[b] ? keys[b] : -INFINITY);
    });
    for (const int64_t kept : {int64_t{0}, int64_t{1}, counts[e] / 2, counts[e] + 1}) {
      std::vector<int64_t> first(
          expected.begin(), expected.begin() + std::min<int64_t>(kept, expected.size()));
      std::sort(first.begin(), first.end());
      if (slots.best(e, keys.data(), kept) != first) fail("best");
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

}  // namespace

int main(int argc, char** argv) {
  num_threads = argc > 1 ? std::atoi(argv[1]) : 1;
  for (const char* isa : {"generic", "avx2", "avx512", "avx512_bf16"}) {
    if (!set_isa(isa)) {
      std::printf("%s: not on this machine\n", isa);
      continue;
    }
    for (const Type type : {Type::kF64, Type::kF32, Type::kBf16, Type::kF16}) {
      for (const bool transposed : {false, true}) {
        test_layer(type, 1, 1, 1, transposed);
        test_layer(type, 7, 33, 3, transposed);
        test_layer(type, 19, 70, 34, transposed);
        test_layer(type, 300, 65, 33, transposed);
        test_layer(type, 23, 601, 65, transposed);
        test_layer(type, 520, 17, 129, transposed);
        test_layer(type, 24, 64, 320, transposed);
        test_layer(type, 2, 2100, 5, transposed);
        test_layer(type, 13, 2100, 37, transposed);
      }
      test_unpermute(type, 5, 3, 1);
      test_unpermute(type, 9, 2, 77);
    }
    for (const Type type : {Type::kF64, Type::kF32}) {
      test_router(type, 3, 2, 1, 1);
      test_router(type, 9, 7, 2, 1);
      test_router(type, 9, 40, 8, 1);
      test_router(type, 9, 300, 21, 1);
      test_router(type, 9, 35, 4, 7);
      test_router(type, 9, 64, 8, 8);
    }
    std::printf("%s: done\n", isa);
  }
  std::mt19937 random(1);
  for (const int64_t num_slots : {0, 1, 50, 1000}) {
    for (const int64_t E : {1, 3, 40}) test_selection(num_slots, E, 1 + random() % 16, random);
  }
  if (failures) std::printf("%d failures\n", failures);
  return failures != 0;
}
