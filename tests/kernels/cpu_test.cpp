// The CPU kernels without torch, for the sanitizers: every task on every instruction set, at odd
// sizes, on buffers that end where the data ends, against sums in double. `make test-kernels`.
//
// With an argument N, tasks are run by N threads, which is what the thread sanitizer is to watch.
#include <atomic>
#include <cstdlib>
#include <functional>
#include <memory>
#include <thread>

#include "cpu/kernels/kernels.h"
#include "memory_tests.h"
#include "plain_tests.h"
#include "shared_tests.h"

using namespace harness;
using namespace moe_ext::cpu::kernels;
using moe_ext::Activation;
using oracle::Numbers;

namespace {

int num_threads = 1;

// Runs task(i, scratch) for i in [0, count), by several threads if asked for.
void run(int64_t count, int64_t scratch_bytes, const std::function<void(int64_t, void*)>& task) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    std::unique_ptr<void, decltype(&std::free)> scratch(
        std::aligned_alloc(64, (scratch_bytes + 63) / 64 * 64 + 64), &std::free);
    for (int64_t i; (i = next.fetch_add(1)) < count;) task(i, scratch.get());
  };
  std::vector<std::thread> threads;
  for (int t = 1; t < num_threads; ++t) threads.emplace_back(work);
  work();
  for (std::thread& thread : threads) thread.join();
}

const TypeKernels& kernels_of(Type type) { return current().type[static_cast<int>(type)]; }
const RouterKernels& router_kernels_of(Type type) {
  return current().router[type == Type::kF64 ? 0 : 1];
}

// Token by token.
struct Cpu {
  static constexpr bool kWritesSkipped = false;

  static RouterArgs args(const oracle::Router& r, const void* logits) {
    return {r.E, r.K, r.score, r.renormalize, r.scale, logits};
  }

  static void unpermute(const shared_tests::Unpermuting& u) {
    const TypeKernels& kernels = kernels_of(u.type);
    const UnpermuteArgs args{u.K, u.H, u.rows, u.row_map, u.weights, u.out};
    const UnpermuteGradArgs grad_args{u.K,           u.H,       u.grad_out,  u.rows,
                                      u.slot_of_row, u.weights, u.grad_rows, u.grad_weights};
    run(u.T, 0, [&](int64_t t, void*) { kernels.unpermute(args, t, t + 1); });
    run(u.T * u.K, 0, [&](int64_t r, void*) { kernels.unpermute_backward(grad_args, r, r + 1); });
  }

  static void choose(
      Type type, const oracle::Router& router, const void* logits, const void* bias, int64_t* ids) {
    const RouterKernels& kernels = router_kernels_of(type);
    run(router.T, kernels.scratch_bytes(router.E, router.K), [&](int64_t t, void* scratch) {
      kernels.choose(
          args(router, logits), {bias, router.groups, router.topk_groups}, t, t + 1, ids, scratch);
    });
  }
  static void weigh(
      Type type, const oracle::Router& router, const void* logits, const int64_t* ids,
      void* weights, void* probs) {
    run(router.T, 0, [&](int64_t t, void*) {
      router_kernels_of(type).weights(args(router, logits), ids, t, t + 1, weights, probs);
    });
  }
  static void router_backward(
      Type type, const oracle::Router& router, const void* logits, const int64_t* ids,
      const void* grad_weights, const void* grad_probs, void* grad) {
    const RouterKernels& kernels = router_kernels_of(type);
    run(router.T, kernels.scratch_bytes(router.E, router.K), [&](int64_t t, void* scratch) {
      kernels.backward(
          args(router, logits), ids, grad_weights, grad_probs, t, t + 1, grad, scratch);
    });
  }

  static int64_t count(const bool* mask, int64_t T) {
    return mask ? std::count(mask, mask + T, true) : T;
  }
  static void z_loss(
      Type type, const void* logits, const bool* mask, int64_t T, int64_t E, Buffer& loss) {
    const RouterKernels& kernels = router_kernels_of(type);
    std::vector<char> scratch(kernels.scratch_bytes(E, 0));
    const double sum = kernels.z_loss(logits, E, mask, 0, T, scratch.data());
    loss.fill(sum / std::max<int64_t>(count(mask, T), 1));
  }
  static void z_loss_backward(
      Type type, double grad_loss, const void* logits, const bool* mask, int64_t T, int64_t E,
      Buffer& grad) {
    const double scale = grad_loss / std::max<int64_t>(count(mask, T), 1);
    run(T, 0, [&](int64_t t, void*) {
      router_kernels_of(type).z_loss_backward(logits, E, mask, scale, t, t + 1, grad.data());
    });
  }
};

void test_sum_dots(Type type, int64_t T, int64_t E) {
  std::mt19937 random(2);
  const Buffer rows(type, T * E, random), row(type, E, random);
  std::unique_ptr<bool[]> mask(new bool[T]);
  for (int64_t t = 0; t < T; ++t) mask[t] = t % 3 > 0;
  for (const bool* token_mask : {static_cast<const bool*>(nullptr), (const bool*)mask.get()}) {
    double expected = 0, largest = 0;
    for (int64_t i = 0; i < T * E; ++i) {
      const double term = rows.values[i] * row.values[i % E];
      if (!token_mask || token_mask[i / E]) expected += term;
      largest += std::fabs(term);
    }
    const double sum =
        router_kernels_of(type).sum_dots(rows.data(), row.data(), E, token_mask, 0, T);
    expect(
        std::fabs(sum - expected) <= 1e-5 * largest, describe("sum of dots", "type", type, "E", E));
  }
}

constexpr Tolerance kTolerance{1e-12, 1e-5, 0x1p-6, 0x1p-9};

// weight [E, N, K] of rows in the order of gemm/formats/packed.h.
Buffer packed(const Buffer& weight, int64_t E, int64_t N, int64_t K, bool gated) {
  const int64_t splits = gated ? 2 : 1, width = kBlockN / splits, n_count = N / splits;
  const int64_t blocks = (n_count + width - 1) / width;
  const int64_t terms = weight.type() == Type::kBf16 ? 2 : 1, steps = (K + terms - 1) / terms;
  Buffer out(weight.type(), E * blocks * steps * kBlockN * terms);
  for (int64_t row = 0; row < E * N; ++row) {
    const int64_t e = row / N, split = row % N / n_count, n = row % N % n_count;
    for (int64_t k = 0; k < K; ++k) {
      const int64_t step = (e * blocks + n / width) * steps + k / terms;
      const int64_t column = split * width + n % width;
      out.values[(step * kBlockN + column) * terms + k % terms] = weight.values[row * K + k];
    }
  }
  out.write();
  return out;
}

// A layer of two experts, the first with `rows`, the second with 5; tokens are gathered.
void test_layer(Type type, int64_t rows, int64_t H, int64_t I, bool transposed) {
  std::mt19937 random(1);
  const TypeKernels& kernels = kernels_of(type);
  const int64_t N = rows + 5, T = N / 2 + 1, W = 2 * I, E = 2;
  const std::string name =
      describe("layer", "type", type, "rows", rows, "H", H, "I", I, "transposed", transposed);
  std::vector<int32_t> token(N);
  for (int64_t r = 0; r < N; ++r) token[r] = static_cast<int32_t>(r < rows ? r * T / rows : r % T);
  std::sort(token.begin() + rows, token.end());
  // By token, and as they lie.
  const std::vector<int32_t> offsets{0, static_cast<int32_t>(rows), static_cast<int32_t>(N)};
  const oracle::Groups gathered{offsets, token}, dense{offsets};
  Buffer x(type, T * H, random), grad(type, T * H, random);
  Buffer up_weights(type, E * W * H, random, 1 / std::sqrt(H));
  Buffer down_weights(type, E * H * I, random, 1 / std::sqrt(I));
  Buffer up_bias(type, E * W, random), down_bias(type, E * H, random);
  const Type compute = compute_of(type);
  Buffer row_weight(compute, N, random);
  const auto weights = [&](Buffer& buffer, int64_t n_count, int64_t k_count) {
    return transposed ? Weights{buffer.data(), n_count * k_count, 1, n_count}
                      : Weights{buffer.data(), n_count * k_count, k_count, 1};
  };
  // out[token of r] += weight of r * sums[r].
  const auto scatter = [&](const Numbers& sums, const Numbers& weight) {
    Numbers out(T * H);
    gathered.each([&](int64_t r, int64_t) {
      for (int64_t h = 0; h < H; ++h) out[token[r] * H + h] += weight[r] * sums[r * H + h];
    });
    return out;
  };

  std::vector<RowBlock> blocks, experts{{0, 0, rows, rows}, {1, rows, N, N - rows}};
  for (const RowBlock& expert : experts) {
    for (int64_t begin = expert.begin; begin < expert.end; begin += kernels.max_block_rows) {
      const int64_t end = std::min(begin + kernels.max_block_rows, expert.end);
      blocks.push_back({expert.expert, begin, end, expert.expert_rows});
    }
  }
  const int64_t scratch = kernels.scratch_bytes(
                              std::min(std::max<int64_t>(rows, 5), kernels.max_block_rows),
                              std::max(H, W), kMaxNBlocks) +
                          (T + 1) * kMaxNBlocks * kBlockN * 8;

  // Forward.
  Buffer hidden(type, N * W), activated(type, N * I), out(type, T * H);
  const Weights gate = weights(up_weights, W, H);
  Weights up = gate;
  up.data = up_weights.at(I * gate.n_stride);
  const UpArgs up_args{
      H,
      I,
      Activation::kSilu,
      true,
      {x.data(), H, token.data()},
      gate,
      up,
      {up_bias.data(), W},
      {up_bias.at(I), W},
      hidden.data(),
      activated.data(),
      transposed ? kForwardNBlocks : 1};
  const int64_t up_cols = (W + up_args.n_blocks * kBlockN - 1) / (up_args.n_blocks * kBlockN);
  run(blocks.size() * up_cols, scratch, [&](int64_t i, void* s) {
    const int64_t col = i % up_cols;
    kernels.up(up_args, blocks[i / up_cols], col, col + 1 < up_cols, s);
  });
  Numbers expected_hidden(N * W), no_grad(N * I);
  oracle::add_product(gathered, x.values, up_weights.values, W, H, !transposed, expected_hidden);
  oracle::add_bias(gathered, up_bias.values, W, expected_hidden);
  check(name + " hidden", hidden, expected_hidden, kTolerance);
  check(
      name + " activated", activated,
      oracle::activate(
          dense, Activation::kSilu, true, expected_hidden, no_grad, row_weight.values, I)
          .activated,
      kTolerance);

  const ProductArgs product_args{
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
  std::vector<RowBlock> token_block_rows;
  std::vector<TokenBlock> token_blocks;
  for (const int64_t begin : {int64_t{0}, T / 2}) {
    const int64_t end = begin == 0 ? T / 2 : T;
    const int64_t first = token_block_rows.size();
    for (const RowBlock& block : blocks) {
      const auto edge = [&](int64_t t) {
        return std::lower_bound(token.begin() + block.begin, token.begin() + block.end, t) -
               token.begin();
      };
      if (edge(begin) < edge(end))
        token_block_rows.push_back({block.expert, edge(begin), edge(end), block.expert_rows});
    }
    token_blocks.push_back({begin, end, first, static_cast<int64_t>(token_block_rows.size())});
  }
  const auto run_product = [&](const TypeKernels& kernels, const ProductArgs& args) {
    const int64_t pitch = args.n_blocks * kBlockN;
    const int64_t cols = (args.N + pitch - 1) / pitch;
    run(2 * cols, scratch, [&](int64_t i, void* s) {
      const int64_t col = i % cols;
      kernels.product(
          args, token_block_rows.data(), token_blocks[i / cols], col, col + 1 < cols, s);
    });
  };
  run_product(kernels, product_args);
  Numbers finished(N * H);
  oracle::add_product(dense, activated.values, down_weights.values, H, I, !transposed, finished);
  oracle::add_bias(dense, down_bias.values, H, finished);
  check(name + " out", out, scatter(finished, row_weight.values), kTolerance);

  if (!transposed) {  // the same from packed weights
    const TypeKernels& from_packed = current().packed[static_cast<int>(type)];
    const Buffer packed_up = packed(up_weights, E, W, H, true);
    const Buffer packed_down = packed(down_weights, E, H, I, false);
    const int64_t block_up = packed_up.count() / E / ((I + kSplitN - 1) / kSplitN);
    const int64_t block_down = packed_down.count() / E / ((H + kBlockN - 1) / kBlockN);
    UpArgs packed_up_args = up_args;
    packed_up_args.gate =
        packed_up_args.up = {packed_up.data(), packed_up.count() / E, block_up, 0};
    ProductArgs packed_product_args = product_args;
    packed_product_args.weights = {packed_down.data(), packed_down.count() / E, block_down, 0};
    const Numbers before = activated.values;
    activated.fill(0);
    hidden.fill(0);
    out.fill(0);
    run(blocks.size() * up_cols, scratch, [&](int64_t i, void* s) {
      const int64_t col = i % up_cols;
      from_packed.up(packed_up_args, blocks[i / up_cols], col, col + 1 < up_cols, s);
    });
    check(name + " packed hidden", hidden, expected_hidden, kTolerance);
    check(name + " packed activated", activated, before, kTolerance);
    run_product(from_packed, packed_product_args);
    check(name + " packed out", out, scatter(finished, row_weight.values), kTolerance);
  }

  // Backward, from the pre-activation as it was stored.
  Numbers grad_activated(N * I);
  oracle::add_product(gathered, grad.values, down_weights.values, I, H, transposed, grad_activated);
  oracle::Activated expected = oracle::activate(
      dense, Activation::kSilu, true, hidden.values, grad_activated, row_weight.values, I);
  gathered.each([&](int64_t r, int64_t e) {
    for (int64_t h = 0; h < H; ++h) {
      expected.dots[r] += grad.values[token[r] * H + h] * down_bias.values[e * H + h];
    }
  });
  for (const int64_t n_blocks : {int64_t{1}, kMaxNBlocks}) {
    const int64_t i_cols = (I + kBlockN - 1) / kBlockN;
    Buffer grad_hidden(type, N * W), weighted(type, N * I), grad_sums(compute, i_cols * N);
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
        grad_sums.data(),
        n_blocks};
    const int64_t cols = (I + n_blocks * kBlockN - 1) / (n_blocks * kBlockN);
    run(blocks.size() * cols, scratch, [&](int64_t i, void* s) {
      const int64_t col = i % cols;
      kernels.grad_hidden(hidden_args, blocks[i / cols], col, col + 1 < cols, s);
    });
    check(name + " grad_hidden", grad_hidden, expected.grad_hidden, kTolerance);
    check(name + " weighted", weighted, expected.weighted, kTolerance);
    Numbers grad_weights(N);
    grad_sums.read();
    for (int64_t i = 0; i < i_cols * N; ++i) grad_weights[i % N] += grad_sums.values[i];
    expect(error(grad_weights, expected.dots, 0) <= 1e-5, name + " grad_weight_sums");

    Weights back = gate;
    std::swap(back.n_stride, back.k_stride);
    Buffer grad_x(type, T * H);
    run_product(
        kernels, {W,
                  H,
                  {grad_hidden.data(), W, nullptr},
                  back,
                  {nullptr, 0},
                  token.data(),
                  nullptr,
                  grad_x.data(),
                  n_blocks});
    Numbers grad_rows(N * H);
    oracle::add_product(dense, grad_hidden.values, up_weights.values, H, W, transposed, grad_rows);
    check(name + " grad_x", grad_x, scatter(grad_rows, Numbers(N, 1)), kTolerance);

    if (n_blocks > 1) continue;
    // And an idle expert.
    std::vector<RowBlock> three = experts;
    three.push_back({2, N, N, 0});
    oracle::Groups three_gathered = gathered;
    three_gathered.offsets.push_back(static_cast<int32_t>(N));
    Buffer grad_up(type, 3 * W * H), sums(type, 3 * W);
    const GradWeightsArgs grad_args{
        W,
        H,
        {grad_hidden.data(), W, nullptr},
        {x.data(), H, token.data()},
        grad_up.data(),
        W * H,
        H,
        rows % 2 == 0};
    const int64_t blocks_m = (W + kGradBlockM - 1) / kGradBlockM;
    const int64_t blocks_n = (H + kGradBlockN - 1) / kGradBlockN;
    const auto run_grad_weights = [&](const GradWeightsArgs& args) {
      run(3 * blocks_m * blocks_n, kernels.grad_scratch_bytes(std::max<int64_t>(rows, 5)),
          [&](int64_t i, void* s) {
            kernels.grad_weights(
                args, three[i / blocks_n / blocks_m], i / blocks_n % blocks_m, i % blocks_n, s);
          });
    };
    run_grad_weights(grad_args);
    const ColumnSumArgs sum_args{
        W, {grad_hidden.data(), W, nullptr}, row_weight.data(), sums.data()};
    const int64_t w_cols = (W + kBlockN - 1) / kBlockN;
    run(3 * w_cols, 64,
        [&](int64_t i, void*) { kernels.column_sum(sum_args, three[i / w_cols], i % w_cols); });
    Numbers expected_grad =
        oracle::grad_weights(three_gathered, grad_hidden.values, x.values, W, H);
    check(name + " grad_up", grad_up, expected_grad, kTolerance);
    // Added to what is there, also in the compute type.
    for (double& value : expected_grad) value += 0.5;
    for (const bool wide : {false, true}) {
      Buffer sum(wide ? compute : type, 3 * W * H);
      sum.fill(0.5);
      GradWeightsArgs add_args = grad_args;
      add_args.grad = sum.data();
      add_args.add = true;
      add_args.wide = wide;
      run_grad_weights(add_args);
      check(name + " added grad_up", sum, expected_grad, kTolerance);
    }
    check(
        name + " sums", sums,
        oracle::sum_rows(three_gathered, grad_hidden.values, row_weight.values, W), kTolerance);
  }
}

// The activations themselves, which the oracle takes from common/: silu by its formula, and all
// slopes by differences.
void test_activations() {
  for (int i = 0; i < 7; ++i) {
    const auto activation = static_cast<Activation>(i);
    for (const bool gated : {false, true}) {
      if (activation == Activation::kSwigluClamped && !gated) continue;
      moe_ext::dispatch_activation(activation, gated, [&](auto f) {
        using F = decltype(f);
        const std::string name = describe("activation", "activation", i, "gated", gated);
        for (double gate = -3.05; gate < 3.1; gate += 0.3) {
          constexpr double kUp = 0.7, kStep = 1e-6, kGrad = 1.3;
          const auto slope = [&](double by_gate, double by_up) {
            const double above = F::value(gate + by_gate, kUp + by_up);
            return kGrad * (above - F::value(gate - by_gate, kUp - by_up)) / (2 * kStep);
          };
          double dgate = 0, dup = 0;
          F::grad(gate, kUp, kGrad, &dgate, &dup);
          expect(std::fabs(dgate - slope(kStep, 0)) < 1e-7, name + ": by gate");
          if (F::kGated) expect(std::fabs(dup - slope(0, kStep)) < 1e-7, name + ": by up");
          const double silu = gate / (1 + std::exp(-gate));
          const double expected = silu * (F::kGated ? kUp : 1);
          if (activation != Activation::kSilu) continue;
          expect(std::fabs(F::value(gate, kUp) - expected) < 1e-14, name + ": value");
        }
      });
    }
  }
}

struct LayerCase {
  int64_t rows, H, I;
};
constexpr LayerCase kLayers[] = {
    {1, 1, 1},      {7, 33, 3},    {19, 70, 34}, {300, 65, 33},  {23, 601, 65},
    {520, 17, 129}, {24, 64, 320}, {2, 2100, 5}, {13, 2100, 37},
};

}  // namespace

int main(int argc, char** argv) {
  num_threads = argc > 1 ? std::atoi(argv[1]) : 1;
  std::mt19937 random(1);
  for (const char* isa : {"generic", "avx2", "avx512", "avx512_bf16"}) {
    if (!set_isa(isa)) {
      std::printf("%s: not on this machine\n", isa);
      continue;
    }
    context = std::string(isa) + " ";
    for (const Type type : kTypes) {
      for (const auto& [rows, H, I] : kLayers) {
        for (const bool transposed : {false, true}) test_layer(type, rows, H, I, transposed);
      }
    }
    shared_tests::test_all<Cpu>(random);
    for (const Type type : kComputeTypes) {
      for (const int64_t E : {2, 7, 40, 300, 35, 64}) test_sum_dots(type, 9, E);
    }
    std::printf("%s: done\n", isa);
  }
  context.clear();
  test_activations();
  plain_tests::test_all(random);
  memory_tests::test_all(std::max(num_threads, 2));
  return finish();
}
