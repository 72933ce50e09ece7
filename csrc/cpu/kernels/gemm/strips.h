// Products of a few rows in the order of tiles, without packing, where neighbouring columns are
// neighbours in memory: a tile reads them where they lie.
#pragma once

#include "cpu/kernels/gemm/operands.h"

namespace moe_ext::cpu::kernels {
namespace {

// W: the format of B (formats/).
template <class W>
struct Strips : W::Operands {
  using O = typename W::Operands;
  using Columns = typename W::Columns;
  using O::broadcast;
  using O::kLanes;
  using O::kPanelSplitN;
  using O::kTermsPerStep;
  using O::multiply_add;
  using typename O::C;
  using typename O::Operand;
  using typename O::OperandReg;
  using typename O::Reg;

  // More rows are worth a packed panel.
  static constexpr int64_t kMaxM = 2 * kTileM;
  // Of a block, so that blocks side by side read the same rows of memory soon after each other, and
  // the lines of the next terms have time to come.
  static constexpr int64_t kBlockTerms = 64 * kTermsPerStep;

  // Terms [first, first + terms) of a block: those to multiply, or to fetch meanwhile.
  struct Block {
    const Columns& columns;
    int64_t first, terms;
  };

  // c [rows, kBlockN] (+)= products of all rows (operands), which begin with the block's terms, and
  // columns, in tiles as even as can be.
  static void block(const char* const* a, int64_t rows, const Block& b, const Block& coming, C* c) {
    const Block nothing{b.columns, b.first, 0};
    for (int64_t tiles = ceil_div(rows, kTileM), done = 0; tiles > 0; --tiles) {
      const int64_t count = ceil_div(rows - done, tiles);
      tile(a + done, count, b, done ? nothing : coming, c + done * kBlockN);
      done += count;
    }
  }

 private:
  // The same of rows <= kM.
  template <int kM = kTileM>
  static void tile(const char* const* a, int64_t rows, const Block& b, const Block& coming, C* c) {
    if constexpr (kM > 1) {
      if (rows < kM) return tile<kM - 1>(a, rows, b, coming, c);
    }
    for (int64_t n = 0; n < larger(b.columns.count[0], b.columns.count[1]); n += kPanelSplitN) {
      const Panel now(b, n), later(coming, n);
      const bool whole = smaller(now.count[0], now.count[1]) >= kPanelSplitN;
      (whole ? panel<kM, true> : panel<kM, false>)(a, now, later, b.first > 0, c + n);
    }
  }

  // A tile's columns of both splits, from n on, of which count[split] exist.
  struct Panel {
    typename W::Steps split[2];
    int64_t count[2], terms;

    Panel(const Block& b, int64_t n)
        : split{W::steps(b.columns, 0, n, b.first), W::steps(b.columns, 1, n, b.first)},
          count{b.columns.count[0] - n, b.columns.count[1] - n},
          terms(b.terms) {}
    // Into the second cache: the first would lose a block's lines before they are used.
    MOE_INLINE void prefetch(int64_t k) const {
      if (k + kTermsPerStep > terms) return;
      for (int i = 0; i < 2; ++i) {
        split[i].template prefetch<2>(k, smaller(count[i], kPanelSplitN));
      }
    }
  };

  // kWhole: all of a tile's columns exist.
  template <int kM, bool kWhole>
  static MOE_NOINLINE void panel(
      const char* const* a, const Panel& from, const Panel& coming, bool accumulate, C* c) {
    constexpr int kHalf = kTileVecs / 2;
    const Panel b = from, later = coming;  // not written by way of c, as the compiler sees
    Reg sum[kM][kTileVecs];
    const auto place = [&](int m, int j) {
      return c + m * kBlockN + j * kLanes + (j < kHalf ? 0 : kSplitN - kPanelSplitN);
    };
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m) {
#pragma GCC unroll 4
      for (int j = 0; j < kTileVecs; ++j) {
        sum[m][j] = accumulate ? read_as<Reg>(place(m, j)) : Reg{};
      }
    }
    const char* row[kM];
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m) row[m] = a[m];
    const auto add_step = [&](int64_t k, auto read) __attribute__((always_inline)) {
      const typename W::Steps::Step step[2] = {
          b.split[0].step(k, b.terms), b.split[1].step(k, b.terms)};
      OperandReg operand[kTileVecs];
#pragma GCC unroll 4
      for (int j = 0; j < kTileVecs; ++j) {
        const int64_t n = j % kHalf * kLanes;
        operand[j] = step[j / kHalf].load(n, kWhole ? kLanes : b.count[j / kHalf] - n);
      }
      const int64_t at = k / kTermsPerStep * static_cast<int64_t>(sizeof(Operand));
#pragma GCC unroll 8
      for (int m = 0; m < kM; ++m) {
        const OperandReg x = broadcast(read(row[m] + at));
#pragma GCC unroll 4
        for (int j = 0; j < kTileVecs; ++j) sum[m][j] = multiply_add(x, operand[j], sum[m][j]);
      }
    };
    int64_t k = 0;
    for (; k + kTermsPerStep <= b.terms; k += kTermsPerStep) {
      later.prefetch(k);
      add_step(k, [](const char* p) { return read_as<Operand>(p); });
    }
    // A pair without its second term.
    if (k < b.terms) add_step(k, [](const char* p) { return Operand(read_as<uint16_t>(p)); });
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m) {
#pragma GCC unroll 4
      for (int j = 0; j < kTileVecs; ++j) {
        __builtin_memcpy(place(m, j), &sum[m][j], sizeof(Reg));
      }
    }
  }
};

}  // namespace
}  // namespace moe_ext::cpu::kernels
