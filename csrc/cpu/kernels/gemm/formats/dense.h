// Weights as they are, in the dtype of the tokens; and the tokens themselves.
//
// A format is all that a product knows of how its B is stored. It gives
//   Columns                        where the columns of a block lie: count[split], size(),
//                                  has_dense_terms(): whether a column's terms are neighbours
//   columns, pair_columns          those of an expert's matrix
//   kHasTerms                      whether that occurs; if not, Terms is empty
//   Terms, terms(b, split, n, k)   reads consecutive terms of columns, where those are dense
//   Steps, steps(b, split, n, k)   reads consecutive columns of a step, where those are dense
//   line_grids                     the lines of memory that a block of terms lies in
//   kLiesInPanels                  whether operands are stored as tiles read them, steps kBlockN
//                                  operands apart; then panel(b, p, k) says where
// and every load gives operands (gemm/operands.h), so that whatever is stored is decoded there.
#pragma once

#include "cpu/kernels/gemm/operands.h"
#include "cpu/kernels/gemm/prefetch.h"

namespace moe_ext::cpu::kernels {
namespace {

template <class S>
struct Dense {
  using Stored = S;
  using Operands = kernels::Operands<S>;
  using V = typename Operands::V;
  using OperandReg = typename Operands::OperandReg;
  static constexpr bool kPairs = Operands::kPairs;
  static constexpr int kLanes = Operands::kLanes;
  static constexpr int kTermsPerStep = Operands::kTermsPerStep;
  static constexpr bool kHasTerms = true;
  static constexpr bool kLiesInPanels = false;

  // The columns of a block are two splits: gate and up, or simply neighbours.
  struct Columns {
    const S* data[2];
    int64_t count[2];  // 0 to kSplitN
    int64_t n_stride, k_stride;
    const int32_t* k_index;  // gathers the terms; needs n_stride == 1
    int64_t size() const { return count[0] + count[1]; }
    bool has_dense_terms() const { return k_stride == 1 && !k_index; }
  };

  // The columns from n on of an expert's matrix with N of them.
  static Columns columns(const Weights& weights, int64_t expert, int64_t n, int64_t N) {
    return neighbours(
        of_expert(weights, expert) + n * weights.n_stride, N - n, weights.n_stride,
        weights.k_stride);
  }
  // The same of two matrices, a split of each.
  static Columns pair_columns(
      const Weights& gate, const Weights& up, int64_t expert, int64_t n, int64_t N) {
    const int64_t count = smaller(N - n, kSplitN);
    return {
        {of_expert(gate, expert) + n * gate.n_stride, of_expert(up, expert) + n * up.n_stride},
        {count, count},
        gate.n_stride,
        gate.k_stride,
        nullptr};
  }

  struct Terms {
    const S* first;
    int64_t n_stride;

    MOE_INLINE const S* at(int64_t n, int64_t k) const { return first + n * n_stride + k; }
    // kLanes operands of column n's terms from k on, of which `terms` exist; zeros after them.
    MOE_INLINE OperandReg load(int64_t n, int64_t k, int64_t terms) const {
      const S* p = at(n, k);
      if constexpr (kPairs) {
        if (terms >= 2 * kLanes) return read_as<OperandReg>(p);
        S term[2 * kLanes] = {};
        for (int64_t i = 0; i < terms; ++i) term[i] = p[i];
        return read_as<OperandReg>(term);
      } else {
        return kernels::load<V>(p, terms).v;
      }
    }
  };
  static MOE_INLINE Terms terms(const Columns& b, int split, int64_t n, int64_t k) {
    return {b.data[split] + n * b.n_stride + k, b.n_stride};
  }

  struct Steps {
    const S* first;
    int64_t k_stride;
    const int32_t* k_index;

    MOE_INLINE const S* row(int64_t k) const {
      return first + (k_index ? k_index[k] : k) * k_stride;
    }
    // The step of term k and, of pairs, the next one, if it exists.
    struct Step {
      const S *first, *second;
      // kLanes operands of the columns from n on, of which `count` exist.
      MOE_INLINE OperandReg load(int64_t n, int64_t count) const {
        if constexpr (kPairs) {
          OperandReg pairs = widen(load_half(first + n, count));
          if (second) pairs |= widen(load_half(second + n, count)) << 16;
          return pairs;
        } else {
          return kernels::load<V>(first + n, count).v;
        }
      }
    };
    MOE_INLINE Step step(int64_t k, int64_t terms) const {
      return {row(k), kPairs && k + 1 < terms ? row(k + 1) : nullptr};
    }
    // `count` columns of a step's terms, which all exist.
    template <int kLocality = 3>
    MOE_INLINE void prefetch(int64_t k, int64_t count) const {
      for (int i = 0; i < kTermsPerStep; ++i) {
        const char* line = reinterpret_cast<const char*>(row(k + i));
        for (int64_t byte = 0; byte < count * static_cast<int64_t>(sizeof(S)); byte += 64) {
          __builtin_prefetch(line + byte, 0, kLocality);
        }
      }
    }
  };
  static MOE_INLINE Steps steps(const Columns& b, int split, int64_t n, int64_t k) {
    if (b.k_index) return {b.data[split] + n, b.k_stride, b.k_index + k};
    return {b.data[split] + n + k * b.k_stride, b.k_stride, nullptr};
  }
  // The rows themselves as terms: column `col` of the rows from `row` on.
  static Steps steps(const Rows& rows, int64_t row, int64_t col) {
    const S* data = static_cast<const S*>(rows.data) + col;
    if (rows.index) return {data, rows.stride, rows.index + row};
    return {data + row * rows.stride, rows.stride, nullptr};
  }

  // The same by columns, of which `left` exist.
  static Columns columns(const Rows& rows, int64_t row, int64_t col, int64_t left) {
    const Steps terms = steps(rows, row, col);
    return neighbours(terms.first, left, 1, terms.k_stride, terms.k_index);
  }

  // The lines of the terms [first, first + terms) of n_blocks blocks side by side, of which b is
  // the first.
  static void line_grids(
      const Columns& b, int64_t n_blocks, int64_t first, int64_t terms,
      Prefetcher::LineGrid (&grids)[2]) {
    constexpr int64_t kElement = sizeof(S);
    constexpr int64_t kLines = Prefetcher::kLinesPerCall, kBytes = 64 * kLines;
    for (int split = 0; split < 2; ++split) {
      const auto at = reinterpret_cast<const char*>(b.data[split] + first * b.k_stride);
      if (b.k_stride == 1 && b.n_stride == terms) {  // all in one
        grids[split] = {at, ceil_div(b.count[split] * terms * kElement, kBytes), kBytes, 1, 0, 64};
      } else if (b.k_stride == 1) {
        const int64_t calls_per_row = ceil_div(terms * kElement, kBytes);
        grids[split] = {at, b.count[split], b.n_stride * kElement, calls_per_row, kBytes, 64};
      } else {
        // Neighbouring lines together; with several blocks one line of a row serves them all.
        const int64_t step = b.k_stride * kElement;
        int64_t columns = b.count[split];
        if (n_blocks > 1 && b.data[1] != b.data[0] + kSplitN * b.n_stride) {
          columns = n_blocks * kSplitN;
        } else if (n_blocks > 1) {
          columns = split == 0 ? n_blocks * kBlockN : 0;
        }
        const int64_t lines = ceil_div(columns * kElement, 64);
        grids[split] = {at, lines, 64, ceil_div(terms, kLines), kLines * step, step};
      }
    }
  }

 private:
  // Neighbours, of which `left` exist.
  static MOE_INLINE Columns neighbours(
      const S* data, int64_t left, int64_t n_stride, int64_t k_stride,
      const int32_t* k_index = nullptr) {
    return {
        {data, data + kSplitN * n_stride},
        {smaller(left, kSplitN), larger(smaller(left - kSplitN, kSplitN), 0)},
        n_stride,
        k_stride,
        k_index};
  }

  static const S* of_expert(const Weights& weights, int64_t expert) {
    return static_cast<const S*>(weights.data) + expert * weights.expert_stride;
  }
  static MOE_INLINE HalfReg load_half(const S* p, int64_t count) {
    if (count >= kLanes) return read_as<HalfReg>(p);
    S lane[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) lane[i] = p[i];
    return read_as<HalfReg>(lane);
  }
};

}  // namespace
}  // namespace moe_ext::cpu::kernels
