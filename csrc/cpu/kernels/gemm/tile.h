// A tile of a product: kTileM rows by a panel's columns, its sums in registers.
#pragma once

#include "cpu/kernels/gemm/operands.h"
#include "cpu/kernels/gemm/prefetch.h"

namespace moe_ext::cpu::kernels {
namespace {

// fn(c, first, count, n_block), c [count, kBlockN] the rows from `first` on, `n_block` which of
// several blocks side by side. Refers to fn, does not own it.
template <class C>
class Epilogue {
 public:
  Epilogue() = default;
  template <class Fn>
  explicit Epilogue(const Fn& fn)
      : fn_(&fn),
        call_([](const void* fn, const C* c, int64_t first, int64_t count, int64_t n_block) {
          (*static_cast<const Fn*>(fn))(c, first, count, n_block);
        }) {}
  MOE_INLINE void operator()(const C* c, int64_t first, int64_t count, int64_t n_block) const {
    if (fn_) call_(fn_, c, first, count, n_block);
  }

 private:
  const void* fn_ = nullptr;
  void (*call_)(const void*, const C*, int64_t, int64_t, int64_t) = nullptr;
};

// Where complete rows of kBlockN go straight from the registers; nowhere if out is null. `past`:
// past the caches, and then rows are aligned to lines.
template <class S>
struct DirectStore {
  S* out = nullptr;
  int64_t stride = 0;
  bool past = false;
};

template <class S>
struct Tile : Operands<S> {
  using O = Operands<S>;
  using O::broadcast;
  using O::kLanes;
  using O::kPanelN;
  using O::kPanelSplitN;
  using O::multiply_add;
  using typename O::C;
  using typename O::Operand;
  using typename O::OperandReg;
  using typename O::Reg;
  using typename O::V;

  // Steps fetched ahead: of a panel that a cache holds, and of one that comes from memory, where
  // the hardware's own prefetching stops at the end of a page.
  static constexpr int kStepsAhead = 4, kFarStepsAhead = 16;

  // c [kM, kBlockN] (+)= a panel: row m's operand of a step lies a_step bytes after that of
  // the step before. `odd`: the last step's second term does not exist in a. The panel's steps lie
  // kPitch operands apart, and its columns of the second split after all of the first that are
  // stored: those of the panel, or of the whole block.
  // Never inlined: its loop needs all the registers, and a caller's variables would take some.
  template <int kM, int kPitch, int kAhead>
  static MOE_NOINLINE void one(
      int64_t steps, bool odd, const char* const* a, int64_t a_step, const Operand* panel, C* c,
      bool accumulate, Prefetcher& prefetcher, const DirectStore<S>& direct) {
    Reg sum[kM][kTileVecs];
    const auto col = [](int j) {
      return j * kLanes + (j < kTileVecs / 2 ? 0 : kSplitN - kPanelSplitN);
    };
    const auto place = [&](int m, int j) { return c + m * kBlockN + col(j); };
    const auto in_panel = [&](int j) { return kPitch == kPanelN ? j * kLanes : col(j); };
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
    int64_t at = 0;
    for (int64_t step = odd ? 1 : 0; step < steps;) {
      auto [line, line_step] = prefetcher.next();
      for (int64_t last = smaller(step + Prefetcher::kLinesPerCall, steps); step < last; ++step) {
        __builtin_prefetch(line, 0, 2);
        line += line_step;
        OperandReg b[kTileVecs];
#pragma GCC unroll 4
        for (int j = 0; j < kTileVecs; ++j) {
          __builtin_prefetch(panel + kAhead * kPitch + in_panel(j));
          b[j] = read_as<OperandReg>(panel + in_panel(j));
        }
#pragma GCC unroll 8
        for (int m = 0; m < kM; ++m) {
          const OperandReg x = broadcast(read_as<Operand>(row[m] + at));
#pragma GCC unroll 4
          for (int j = 0; j < kTileVecs; ++j) sum[m][j] = multiply_add(x, b[j], sum[m][j]);
        }
        at += a_step;
        panel += kPitch;
      }
    }
    if (odd) {
#pragma GCC unroll 8
      for (int m = 0; m < kM; ++m) {
        const OperandReg x = broadcast(read_as<uint16_t>(row[m] + at));
#pragma GCC unroll 4
        for (int j = 0; j < kTileVecs; ++j) {
          sum[m][j] = multiply_add(x, read_as<OperandReg>(panel + in_panel(j)), sum[m][j]);
        }
      }
    }
    if (direct.out) {
#pragma GCC unroll 8
      for (int m = 0; m < kM; ++m) {
#pragma GCC unroll 4
        for (int j = 0; j < kTileVecs; ++j) {
          S* to = direct.out + m * direct.stride + col(j);
          direct.past ? stream(to, V(sum[m][j])) : store(to, V(sum[m][j]));
        }
      }
      return;
    }
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m) {
#pragma GCC unroll 4
      for (int j = 0; j < kTileVecs; ++j) {
        __builtin_memcpy(place(m, j), &sum[m][j], sizeof(Reg));
      }
    }
  }

  // The rows of A: row m's operand of a step lies `step` bytes after that of the step before.
  struct Rows {
    const char* const* row;
    int64_t count, step;
    int64_t fetched_bytes;  // of a row, to be fetched ahead
    bool odd;               // the last step's second term does not exist
  };

  // Where the sums go: the panel's place in c [rows, kBlockN], which the epilogue gets.
  struct Sums {
    C* c;
    int64_t panel_col;
    bool accumulate;
    const Epilogue<C>& epilogue;
    int64_t n_block = 0;
    DirectStore<S> direct = {};
  };

  // The tiles of the rows from `first` on. kFar: the panel was not packed by us but lies in memory,
  // where the first tile reads it, its steps kBlockN operands apart.
  template <bool kFar = false, int kM = kTileM>
  static MOE_INLINE void column(
      const Rows& rows, int64_t steps, const Operand* panel, const Sums& sums,
      Prefetcher& prefetcher, int64_t first = 0) {
    for (; first + kM <= rows.count; first += kM) {
      C* c = sums.c + first * kBlockN;
      const char* const* after = rows.row + first + kM;
      prefetcher.set_rows(after, smaller(rows.count - first - kM, kTileM), rows.fetched_bytes);
      DirectStore<S> direct = sums.direct;
      if (direct.out) direct.out += first * direct.stride + sums.panel_col;
      constexpr int kPitch = kFar ? kBlockN : kPanelN;
      const auto tile =
          kFar && first == 0 ? one<kM, kPitch, kFarStepsAhead> : one<kM, kPitch, kStepsAhead>;
      tile(
          steps, rows.odd, rows.row + first, rows.step, panel, c + sums.panel_col, sums.accumulate,
          prefetcher, direct);
      sums.epilogue(c, first, kM, sums.n_block);
    }
    if constexpr (kM > 1) {
      if (first < rows.count) column<kFar, kM - 1>(rows, steps, panel, sums, prefetcher, first);
    }
  }
};

}  // namespace
}  // namespace moe_ext::cpu::kernels
