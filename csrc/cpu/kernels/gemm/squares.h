// Products of a few rows in the order of tiles, without packing: a square of B is transposed in
// registers and multiplied at once, while the memory behind it is read ahead.
#pragma once

#include "cpu/kernels/gemm/operands.h"
#include "cpu/kernels/simd/shuffle.h"

namespace moe_ext::cpu::kernels {
namespace {

// W: the format of B (formats/), whose terms are dense.
template <class W>
struct Squares : W::Operands {
  using O = typename W::Operands;
  using Columns = typename W::Columns;
  using O::broadcast;
  using O::kLanes;
  using O::kPairs;
  using O::kTermsPerStep;
  using O::multiply_add;
  using O::steps_of;
  using typename O::C;
  using typename O::Operand;
  using typename O::OperandReg;
  using typename O::Reg;

  // More rows are worth a packed panel: a transposed square costs as much as about four.
  static constexpr int64_t kMaxM = kTileM;

  // c [rows, kBlockN] = products of all rows (operands) and columns over all terms; rows <= kM.
  template <int kM = kMaxM>
  static void block(const char* const* a, int64_t rows, const Columns& b, int64_t terms, C* c) {
    if constexpr (kM > 1) {
      if (rows < kM) return block<kM - 1>(a, rows, b, terms, c);
    }
    for (int split = 0; split < 2; ++split, c += kSplitN) {
      for (int64_t n = 0; n < b.count[split]; n += kLanes) {
        columns<kM>(a, W::terms(b, split, n, 0), b.count[split] - n, terms, c + n);
      }
    }
  }

 private:
  // Bytes of each column. A few columns are read side by side, each in a stream of its own.
  static constexpr int64_t kAhead = 512;

  // A vector of columns, of which `count` exist.
  template <int kM>
  static MOE_NOINLINE void columns(
      const char* const* a, const typename W::Terms b, int64_t count, int64_t terms, C* c) {
    constexpr int64_t kTerms = kLanes * kTermsPerStep;
    constexpr int64_t kBytes = kLanes * sizeof(Operand);
    Reg sum[kM] = {};
    int64_t k = 0, at = 0;
    for (; count >= kLanes && k + kTerms <= terms; k += kTerms, at += kBytes) {
      OperandReg square[kLanes];
#pragma GCC unroll 16
      for (int n = 0; n < kLanes; ++n) square[n] = b.load(n, k, kTerms);
      fetch_ahead(b, k, terms);
      transpose(square);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
#pragma GCC unroll 8
        for (int m = 0; m < kM; ++m) {
          const Operand x = read_as<Operand>(a[m] + at + i * sizeof(Operand));
          sum[m] = multiply_add(broadcast(x), square[i], sum[m]);
        }
      }
    }
    for (; k < terms; k += kTerms, at += kBytes) {
      const int64_t left = terms - k;
      OperandReg square[kLanes];
      for (int n = 0; n < kLanes; ++n) {
        square[n] = n < count ? b.load(n, k, left) : OperandReg{};
      }
      transpose(square);
      for (int i = 0; i < smaller(steps_of(left), kLanes); ++i) {
        for (int m = 0; m < kM; ++m) {
          const char* x = a[m] + at + i * sizeof(Operand);
          const bool half = kPairs && i * kTermsPerStep + 1 == left;  // no second term
          sum[m] = multiply_add(
              broadcast(half ? Operand(read_as<uint16_t>(x)) : read_as<Operand>(x)), square[i],
              sum[m]);
        }
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m) __builtin_memcpy(c + m * kBlockN, &sum[m], sizeof(Reg));
  }

  // The lines some way behind the square at k: of the same columns or, past their last term, of
  // the next ones.
  static MOE_INLINE void fetch_ahead(const typename W::Terms& b, int64_t k, int64_t terms) {
    constexpr int64_t kTerms = kAhead * kTermsPerStep / static_cast<int64_t>(sizeof(Operand));
    const bool same = k + kTerms < terms;
#pragma GCC unroll 16
    for (int n = 0; n < kLanes; ++n) {
      const auto* line = same ? b.at(n, k + kTerms) : b.at(n + kLanes, k + kTerms - terms);
      __builtin_prefetch(reinterpret_cast<const char*>(line), 0, 2);
    }
  }
};

}  // namespace
}  // namespace moe_ext::cpu::kernels
