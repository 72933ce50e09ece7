// Packing: a block of B, or of A's transpose, as a tile reads it: [steps][pitch] operands.
#pragma once

#include "cpu/kernels/gemm/operands.h"
#include "cpu/kernels/simd/shuffle.h"

namespace moe_ext::cpu::kernels {
namespace {

// F: the format of what is packed (formats/).
template <class F>
struct Pack : F::Operands {
  using O = typename F::Operands;
  using Columns = typename F::Columns;
  using O::kLanes;
  using O::kPanelN;
  using O::kPanelSplitN;
  using O::kTermsPerStep;
  using O::steps_of;
  using typename O::Operand;
  using typename O::OperandReg;
  using typename O::Reg;

  // Panel `index` of b: its columns of both splits.
  static void panel(
      const Columns& b, int64_t index, int64_t first_term, int64_t terms, Operand* out) {
    const int64_t n = index * kPanelSplitN;
    for (int split = 0; split < 2; ++split, out += kPanelSplitN) {
      const int64_t count = smaller(b.count[split] - n, kPanelSplitN);
      if constexpr (F::kHasTerms) {
        if (b.has_dense_terms()) {
          transposed(F::terms(b, split, n, first_term), count, kPanelSplitN, terms, out, kPanelN);
          continue;
        }
      }
      straight(F::steps(b, split, n, first_term), count, kPanelSplitN, terms, out, kPanelN, kLanes);
    }
  }

  // Panels that hold any of b's columns.
  static int64_t panels_of(const Columns& b) {
    return ceil_div(larger(b.count[0], b.count[1]), kPanelSplitN);
  }

  // By value: what is written could be `from` to the compiler, which would read it again each time.

  // `width` (a multiple of kLanes) columns, of which `count` exist. The vectors of columns of a
  // step lie vec_pitch operands apart.
  static void straight(
      const typename F::Steps from, int64_t count, int64_t width, int64_t terms, Operand* out,
      int64_t pitch, int64_t vec_pitch) {
    constexpr int64_t kFetch = 8;  // terms ahead
    for (int64_t k = 0; k < terms; k += kTermsPerStep, out += pitch) {
      const auto step = from.step(k, terms);
      if (k + kFetch + kTermsPerStep <= terms) from.prefetch(k + kFetch, count);
      Operand* to = out;
      for (int64_t n = 0; n < width; n += kLanes, to += vec_pitch) {
        const OperandReg packed = step.load(n, count - n);
        __builtin_memcpy(to, &packed, sizeof(packed));
      }
    }
  }

 private:
  // The same from columns whose terms are dense.
  static void transposed(
      const typename F::Terms from, int64_t count, int64_t width, int64_t terms, Operand* out,
      int64_t pitch) {
    constexpr int64_t kTerms = kLanes * kTermsPerStep;
    for (int64_t n = 0; n < width; n += kLanes, out += kLanes) {
      int64_t k = 0;
      if (n + kLanes <= count) {
        for (; k + kTerms <= terms; k += kTerms) {
          OperandReg square[kLanes];
#pragma GCC unroll 16
          for (int i = 0; i < kLanes; ++i) square[i] = from.load(n + i, k, kTerms);
          transpose(square);
          Operand* to = out + k / kTermsPerStep * pitch;
#pragma GCC unroll 16
          for (int i = 0; i < kLanes; ++i) {
            __builtin_memcpy(to + i * pitch, &square[i], sizeof(Reg));
          }
        }
      }
      for (; k < terms; k += kTerms) {
        OperandReg square[kLanes];
        for (int i = 0; i < kLanes; ++i) {
          square[i] = n + i < count ? from.load(n + i, k, terms - k) : OperandReg{};
        }
        transpose(square);
        for (int i = 0; i < smaller(steps_of(terms - k), kLanes); ++i) {
          __builtin_memcpy(out + (k / kTermsPerStep + i) * pitch, &square[i], sizeof(Reg));
        }
      }
    }
  }
};

}  // namespace
}  // namespace moe_ext::cpu::kernels
