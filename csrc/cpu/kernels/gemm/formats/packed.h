// Weights in the order in which tiles read them, the same for every instruction set:
//   [block][step][kBlockN][terms of a step]
// a block's columns side by side, zeros where the matrix ends. A step is a term, of bf16 a pair of
// them. So a block is one stream of memory, whatever is multiplied, and where the machine
// multiplies what is stored, a tile reads it where it lies. Elsewhere packing only widens.
#pragma once

#include <type_traits>

#include "cpu/kernels/gemm/operands.h"
#include "cpu/kernels/gemm/prefetch.h"

namespace moe_ext::cpu::kernels {
namespace {

// Two terms of bf16 fill what a multiply-add takes, and widen with one instruction each.
template <class S>
constexpr int kPackedStepTerms = std::is_same_v<S, bf16> ? 2 : 1;

template <class S>
struct Packed {
  using Stored = S;
  using Operands = kernels::Operands<S>;
  using Operand = typename Operands::Operand;
  using OperandReg = typename Operands::OperandReg;
  using V = typename Operands::V;
  static constexpr int kLanes = Operands::kLanes;
  static constexpr int kStepTerms = kPackedStepTerms<S>;
  static constexpr bool kHasTerms = false;
  static constexpr bool kLiesInPanels =
      Operands::kTermsPerStep == kStepTerms && sizeof(Operand) == kStepTerms * sizeof(S);

  struct Terms {};
  struct Columns {
    const S* data;  // of a block
    int64_t count[2];
    int64_t size() const { return count[0] + count[1]; }
    static constexpr bool has_dense_terms() { return false; }
  };

  // Weights::n_stride is a block's elements.
  static Columns columns(const Weights& weights, int64_t expert, int64_t n, int64_t N) {
    const int64_t count = N - n;
    return {
        block_of(weights, expert, n / kBlockN),
        {smaller(count, kSplitN), larger(smaller(count - kSplitN, kSplitN), 0)}};
  }
  // Both were packed together: a block is a split of each.
  static Columns pair_columns(
      const Weights& gate, const Weights&, int64_t expert, int64_t n, int64_t N) {
    const int64_t count = smaller(N - n, kSplitN);
    return {block_of(gate, expert, n / kSplitN), {count, count}};
  }

  // Where tiles read panel `index` from term `k` on, a multiple of kStepTerms.
  static const Operand* panel(const Columns& b, int64_t index, int64_t k) {
    return reinterpret_cast<const Operand*>(
        b.data + k * kBlockN + index * Operands::kPanelSplitN * kStepTerms);
  }

  struct Steps {
    const S* first;  // of column n in term 0
    int64_t k;       // of the first term

    MOE_INLINE const S* row(int64_t step_term) const {
      return first + (k + step_term) / kStepTerms * kStepTerms * kBlockN;
    }
    struct Step {
      const S* first;
      bool second;  // of a pair
      // kLanes operands of the columns from n on: zeros beyond the matrix are stored.
      MOE_INLINE OperandReg load(int64_t n, int64_t) const {
        const S* p = first + n * kStepTerms;
        if constexpr (kLiesInPanels) {
          return read_as<OperandReg>(p);
        } else if constexpr (kStepTerms == 2) {
          typedef uint32_t Pairs __attribute__((vector_size(sizeof(OperandReg))));
          const Pairs pairs = read_as<Pairs>(p);
          return reinterpret_cast<OperandReg>(second ? pairs & 0xffff0000u : pairs << 16);
        } else {
          return kernels::load<V>(p, kLanes).v;
        }
      }
    };
    MOE_INLINE Step step(int64_t i, int64_t) const { return {row(i), (k + i) % kStepTerms == 1}; }
    MOE_INLINE void prefetch(int64_t i, int64_t count) const {
      const char* line = reinterpret_cast<const char*>(row(i));
      for (int64_t byte = 0; byte < count * kStepTerms * static_cast<int64_t>(sizeof(S));
           byte += 64) {
        __builtin_prefetch(line + byte);
      }
    }
  };
  static MOE_INLINE Steps steps(const Columns& b, int split, int64_t n, int64_t k) {
    return {b.data + (split * kSplitN + n) * kStepTerms, k};
  }

  static void line_grids(
      const Columns& b, int64_t, int64_t first, int64_t terms, Prefetcher::LineGrid (&grids)[2]) {
    constexpr int64_t kBytes = 64 * Prefetcher::kLinesPerCall;
    const auto at = reinterpret_cast<const char*>(b.data + first * kBlockN);
    const int64_t bytes = terms * kBlockN * static_cast<int64_t>(sizeof(S));
    grids[0] = {at, ceil_div(bytes, kBytes), kBytes, 1, 0, 64};
    grids[1] = {};
  }

 private:
  static const S* block_of(const Weights& weights, int64_t expert, int64_t block) {
    return static_cast<const S*>(weights.data) + expert * weights.expert_stride +
           block * weights.n_stride;
  }
};

}  // namespace
}  // namespace moe_ext::cpu::kernels
