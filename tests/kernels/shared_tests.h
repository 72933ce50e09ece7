// The tests that the kernels of the CPU and those of CUDA both take, by one list of cases, against
// oracle.h. A Device has the kernels' calls, as static functions, and kWritesSkipped: whether its
// unpermute writes the gradient of a skipped slot's weight, or leaves the zero that is there.
#pragma once

#include <memory>

#include "harness.h"
#include "oracle.h"

namespace shared_tests {

using harness::Buffer;
using harness::check;
using harness::compute_of;
using harness::describe;
using harness::expect;
using harness::Tolerance;
using harness::Type;
using oracle::Numbers;

enum IdKind { kRandom, kOneExpert, kSomeSkipped, kAllSkipped };
constexpr IdKind kIdKinds[] = {kRandom, kOneExpert, kSomeSkipped, kAllSkipped};

// ids [N]; skipped ones are -1, E or more.
inline std::vector<int64_t> make_ids(int64_t N, int64_t E, IdKind kind, std::mt19937& random) {
  std::vector<int64_t> ids(N);
  for (int64_t& id : ids) {
    id = kind == kOneExpert     ? E - 1
         : kind == kAllSkipped  ? -1
         : kind == kSomeSkipped ? static_cast<int64_t>(random() % (E + 3)) - 1
                                : static_cast<int64_t>(random() % E);
  }
  return ids;
}

// Rows back to their tokens, and the gradients of it.
struct Unpermuting {
  Type type;
  int64_t T, K, H;
  const int32_t *row_map, *slot_of_row;
  const void *rows, *weights, *grad_out;
  void *out, *grad_rows, *grad_weights;
};
template <class Device>
void test_unpermute(
    Type type, int64_t T, int64_t K, int64_t E, int64_t H, int64_t offset, IdKind kind,
    std::mt19937& random) {
  const std::string name =
      describe("unpermute", "type", type, "H", H, "offset", offset, "kind", int{kind});
  constexpr Tolerance kTolerance{1e-14, 1e-6, 0x1p-7, 0x1p-10};
  const int64_t N = T * K;
  const oracle::Plan plan = oracle::plan(make_ids(N, E, kind, random), K, E);
  const Type compute = compute_of(type);
  const Buffer rows(type, N * H, random, 1, offset), grad_out(type, T * H, random, 1, offset);
  const Buffer weights(compute, N, random);
  Buffer out(type, T * H, offset), grad_rows(type, N * H, offset), grad_weights(compute, N);
  if (Device::kWritesSkipped) grad_weights.fill(-7);
  Device::unpermute(
      {type, T, K, H, plan.row_map.data(), plan.slot_of_row.data(), rows.data(), weights.data(),
       grad_out.data(), out.data(), grad_rows.data(), grad_weights.data()});
  const oracle::Unpermuted expected =
      oracle::unpermute(plan.row_map, K, H, rows.values, weights.values, grad_out.values);
  check(name, out, expected.out, kTolerance);
  check(name + ", grad_rows", grad_rows, expected.grad_rows, kTolerance);
  check(name + ", grad_weights", grad_weights, expected.grad_weights, 1e-5);
}

// Choices, also among ties, NaN and groups; weights, also of skipped choices; and gradients.
template <class Device>
void test_router(
    Type type, int64_t T, int64_t E, int64_t K, int64_t groups, int64_t topk_groups, bool with_bias,
    bool few_values, std::mt19937& random) {
  const Tolerance tolerance{1e-14, 2e-6, 0, 0};
  Buffer logits(type, T * E, random);
  const Buffer bias(type, E, random);
  for (double& z : logits.values) {
    if (few_values) z = std::round(z);  // many ties
    if (few_values && random() % 40 == 0) z = NAN;
  }
  logits.write();
  const Buffer grad_weights(type, T * K, random), grad_probs(type, T * E, random);
  for (const auto score : {moe_ext::ScoreFunction::kSoftmax, moe_ext::ScoreFunction::kSigmoid}) {
    if (score == moe_ext::ScoreFunction::kSigmoid && groups > 1 && E / groups < 2) continue;
    for (const bool renormalize : {false, true}) {
      const std::string name = describe(
          "router", "type", type, "E", E, "K", K, "groups", groups, "bias", with_bias, "few values",
          few_values, "score", static_cast<int>(score), "renormalize", renormalize);
      const oracle::Router router{T, E, K, groups, topk_groups, score, renormalize, 1.5};
      std::vector<int64_t> ids(T * K, -7);
      Device::choose(type, router, logits.data(), with_bias ? bias.data() : nullptr, ids.data());
      expect(
          ids == oracle::choose(router, logits.values, with_bias ? bias.values : Numbers()),
          name + ": ids");
      for (const bool with_skipped : {false, true}) {
        for (size_t s = 0; with_skipped && s < ids.size(); s += 5) ids[s] = s % 2 ? -1 : E;
        Buffer weights(type, T * K), probs(type, T * E);
        Device::weigh(type, router, logits.data(), ids.data(), weights.data(), probs.data());
        const oracle::Routed expected = oracle::weigh(router, logits.values, ids);
        // A skipped choice of a row with NaN is 0 or NaN, too.
        weights.read();
        for (int64_t slot = 0; slot < T * K; ++slot) {
          const bool is_skipped = ids[slot] < 0 || ids[slot] >= E;
          const bool may_be_nan = is_skipped && std::isnan(expected.probs[slot / K * E]);
          if (may_be_nan && std::isnan(weights.values[slot])) weights.values[slot] = 0;
        }
        weights.write();
        check(name + ": weights", weights, expected.weights, tolerance);
        check(name + ": probs", probs, expected.probs, tolerance);
        for (const int which : {1, 2, 3}) {
          Buffer grad(type, T * E);
          Device::router_backward(
              type, router, logits.data(), ids.data(), which & 1 ? grad_weights.data() : nullptr,
              which & 2 ? grad_probs.data() : nullptr, grad.data());
          const Numbers expected_grad = oracle::router_backward(
              router, logits.values, ids, which & 1 ? grad_weights.values : Numbers(),
              which & 2 ? grad_probs.values : Numbers());
          // Of one expert, and by the weight of one choice that is renormalized, the gradient is 0,
          // which is left of numbers of about 1.
          const bool is_zero = E == 1 || (K == 1 && renormalize && which == 1);
          const double floor = is_zero ? 1 : 0;
          check(name + ": gradient", grad, expected_grad, 10 * tolerance.of(type), floor);
        }
      }
    }
  }
}

enum MaskKind { kNoMask, kSomeMasked, kAllMasked };
constexpr MaskKind kMaskKinds[] = {kNoMask, kSomeMasked, kAllMasked};

// The loss, and the gradient of three times it.
template <class Device>
void test_z_loss(Type type, int64_t T, int64_t E, MaskKind kind, std::mt19937& random) {
  const std::string name = describe("z loss", "type", type, "T", T, "E", E, "mask", int{kind});
  constexpr Tolerance kTolerance{1e-13, 1e-5, 0, 0};
  const Buffer logits(type, T * E, random);
  std::unique_ptr<bool[]> mask(new bool[T + 1]);
  for (int64_t t = 0; t < T; ++t) mask[t] = kind == kSomeMasked && random() % 3 > 0 && t + 1 < T;
  oracle::ZLoss expected =
      oracle::z_loss(logits.values, T, E, [&](int64_t t) { return kind == kNoMask || mask[t]; });
  for (double& g : expected.grad) g *= 3;
  Buffer loss(type, 1), grad(type, T * E);
  const bool* token_mask = kind == kNoMask ? nullptr : mask.get();
  Device::z_loss(type, logits.data(), token_mask, T, E, loss);
  Device::z_loss_backward(type, 3, logits.data(), token_mask, T, E, grad);
  check(name, loss, {expected.loss}, kTolerance);
  check(name + ", gradient", grad, expected.grad, kTolerance);
}

template <class Device>
void test_all(std::mt19937& random) {
  for (const Type type : harness::kTypes) {
    for (const IdKind kind : kIdKinds) {
      test_unpermute<Device>(type, 5, 3, 2, 1, 0, kind, random);
      test_unpermute<Device>(type, 9, 2, 4, 77, 0, kind, random);
      for (const int64_t H : {1, 8, 33, 600}) {
        for (const int64_t offset : {0, 1}) {
          test_unpermute<Device>(type, 19, 3, 5, H, offset, kind, random);
        }
      }
    }
  }
  struct RouterCase {
    int64_t T, E, K, groups, topk_groups;
  };
  for (const Type type : harness::kComputeTypes) {
    for (const auto& [T, E, K, groups, topk_groups] :
         {RouterCase{3, 2, 1, 1, 1},
          {7, 1, 1, 1, 1},
          {9, 7, 2, 1, 1},
          {9, 8, 2, 1, 1},
          {6, 12, 2, 6, 2},
          {9, 33, 33, 1, 1},
          {9, 35, 4, 7, 4},
          {5, 35, 4, 35, 5},
          {9, 40, 8, 1, 1},
          {9, 64, 8, 8, 3},
          {9, 64, 8, 8, 4},
          {9, 300, 21, 1, 1},
          {5, 1000, 21, 4, 3}}) {
      for (const bool with_bias : {false, true}) {
        for (const bool few_values : {false, true}) {
          test_router<Device>(type, T, E, K, groups, topk_groups, with_bias, few_values, random);
        }
      }
    }
    for (const MaskKind kind : kMaskKinds) {
      for (const int64_t E : {1, 2, 7, 33, 40, 64, 300}) {
        test_z_loss<Device>(type, 9, E, kind, random);
      }
      test_z_loss<Device>(type, 0, 4, kind, random);
      test_z_loss<Device>(type, 1, 1, kind, random);
      test_z_loss<Device>(type, 120, 8, kind, random);
    }
  }
}

}  // namespace shared_tests
