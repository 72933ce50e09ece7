// Products of few rows or columns: packing would cost more than it saves, so B is read where it
// lies, and a tile's sums run over the terms by vectors (dot products).
#pragma once

#include "cpu/kernels/gemm/operands.h"
#include "cpu/kernels/gemm/prefetch.h"
#include "cpu/kernels/simd/shuffle.h"

namespace moe_ext::cpu::kernels {
namespace {

// W: the format of B (formats/).
template <class W>
struct Dots : W::Operands {
  using O = typename W::Operands;
  using Columns = typename W::Columns;
  using O::kLanes;
  using O::kTermsPerStep;
  using O::multiply_add;
  using typename O::C;
  using typename O::Operand;
  using typename O::OperandReg;
  using typename O::Reg;

  // Terms of a block: the copied rows of kMaxDotM stay in L2.
  static constexpr int64_t kBlockTerms = 64 * kLanes * kTermsPerStep;
  // Bytes. The hardware's own prefetching stops at the end of a page.
  static constexpr int64_t kStreamAhead = 3072;

  // Dot products end in sums over lanes, which must not outweigh the terms.
  static int64_t max_m(int64_t terms) {
    const int64_t vectors = terms / (kLanes * kTermsPerStep);
    return larger(smaller(vectors / 4 * kTileM, kMaxDotM), 1);
  }

  // Two at least, so that one pass over b leaves time to fetch the next.
  static int64_t m_tiles_of(int64_t rows) {
    return larger(ceil_div(rows, kTileM), smaller(rows, 2));
  }

  // c (+)= dot products of all rows and columns over the terms [first, first + terms), which a
  // begins with, in `m_tiles` tiles of kM or fewer rows each, as even as can be.
  template <int kM = kTileM>
  static void block(
      const char* const* a, int64_t rows, int64_t m_tiles, const Columns& b, int64_t first,
      int64_t terms, C* c, Prefetcher& prefetcher) {
    for (; rows > (kM - 1) * m_tiles; --m_tiles, rows -= kM, a += kM) {
      row_panel<kM>(a, b, first, terms, c, prefetcher);
      c += kM * kBlockN;
    }
    if constexpr (kM > 1) {
      if (rows > 0) block<kM - 1>(a, rows, m_tiles, b, first, terms, c, prefetcher);
    }
  }

  // The same of one row, a column at a time, so that b is read from memory in one stream.
  static void stream(
      const char* const* a, const Columns& b, int64_t first, int64_t terms, C* c,
      Prefetcher& prefetcher) {
    for (int split = 0; split < 2; ++split, c += kSplitN) {
      for (int64_t n = 0; n < b.count[split]; ++n) {
        tile<1, 1, kStreamSums>(
            a, W::terms(b, split, n, first), terms, c + n, first > 0, prefetcher);
      }
    }
  }

 private:
  // A single product needs several sums, or every multiply-add would wait for the one before.
  static constexpr int kStreamSums = 4;

  // All columns of b with kM rows of a. The last few columns take one sum as the others do: which
  // kM a row falls into must not show in its bits.
  template <int kM>
  static void row_panel(
      const char* const* a, const Columns& b, int64_t first, int64_t terms, C* c,
      Prefetcher& prefetcher) {
    for (int split = 0; split < 2; ++split, c += kSplitN) {
      int64_t n = 0;
      for (; n + kTileVecs <= b.count[split]; n += kTileVecs) {
        tile<kM, kTileVecs, 1>(
            a, W::terms(b, split, n, first), terms, c + n, first > 0, prefetcher);
      }
      for (; n < b.count[split]; ++n) {
        tile<kM, 1, 1>(a, W::terms(b, split, n, first), terms, c + n, first > 0, prefetcher);
      }
    }
  }

  // c (+)= dot products of kM rows of a (operands) and kN of b, kSums partial sums for each.
  template <int kM, int kN, int kSums>
  static MOE_NOINLINE void tile(
      const char* const* a, const typename W::Terms b, int64_t terms, C* c, bool accumulate,
      Prefetcher& prefetcher) {
    constexpr int64_t kTerms = kLanes * kTermsPerStep;
    constexpr int64_t kBytes = kLanes * sizeof(Operand);
    constexpr int kFetch = kN / 2;  // lines ahead in a step
    constexpr int kSteps = Prefetcher::kLinesPerCall / (kFetch > 0 ? kFetch * kSums : 1);
    typedef C Few __attribute__((vector_size(kN * sizeof(C))));
    Reg sum[kSums][kM][kN] = {};
    int64_t k = 0, at = 0;
    while (k + kSums * kTerms <= terms) {
      auto [line, line_step] = kFetch > 0 ? prefetcher.next() : Prefetcher::Lines{};
      for (int s = 0; s < kSteps && k + kSums * kTerms <= terms; ++s) {
#pragma GCC unroll 4
        for (int p = 0; p < kSums; ++p, k += kTerms, at += kBytes) {
          OperandReg w[kN];
          if (kFetch == 0) {
            __builtin_prefetch(reinterpret_cast<const char*>(b.at(0, k)) + kStreamAhead, 0, 2);
          }
#pragma GCC unroll 4
          for (int n = 0; n < kN; ++n) {
            if (n < kFetch) {
              __builtin_prefetch(line, 0, 2);
              line += line_step;
            }
            w[n] = b.load(n, k, kTerms);
          }
#pragma GCC unroll 8
          for (int m = 0; m < kM; ++m) {
            const OperandReg x = read_as<OperandReg>(a[m] + at);
#pragma GCC unroll 4
            for (int n = 0; n < kN; ++n) sum[p][m][n] = multiply_add(x, w[n], sum[p][m][n]);
          }
        }
      }
    }
    for (; k < terms; k += kTerms, at += kBytes) {
      const int64_t left = smaller(terms - k, kTerms);
#pragma GCC unroll 8
      for (int m = 0; m < kM; ++m) {
        OperandReg x;
        if (left == kTerms) {
          x = read_as<OperandReg>(a[m] + at);
        } else {
          Operand rest[kLanes] = {};
          __builtin_memcpy(rest, a[m] + at, left * (sizeof(Operand) / kTermsPerStep));
          x = read_as<OperandReg>(rest);
        }
#pragma GCC unroll 4
        for (int n = 0; n < kN; ++n) {
          sum[0][m][n] = multiply_add(x, b.load(n, k, left), sum[0][m][n]);
        }
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m, c += kBlockN) {
#pragma GCC unroll 4
      for (int p = 1; p < kSums; ++p) {
#pragma GCC unroll 4
        for (int n = 0; n < kN; ++n) sum[0][m][n] += sum[p][m][n];
      }
      Few sums = first_lanes<Few>(lane_sums(sum[0][m]));
      if (accumulate) sums += read_as<Few>(c);
      __builtin_memcpy(c, &sums, sizeof(Few));
    }
  }
};

}  // namespace
}  // namespace moe_ext::cpu::kernels
