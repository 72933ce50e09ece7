// A block of a weights' gradient: left^T right, a sum over the rows of an expert. Both operands are
// packed, a block of rows at a time, and the tiles of a product run over them.
#pragma once

#include <type_traits>

#include "cpu/kernels/gemm/formats/dense.h"
#include "cpu/kernels/gemm/pack.h"
#include "cpu/kernels/gemm/tile.h"
#include "cpu/kernels/scratch.h"

namespace moe_ext::cpu::kernels {
namespace {

template <class S>
struct GradWeights : Operands<S> {
  using O = Operands<S>;
  using F = Dense<S>;
  using P = Pack<F>;
  using O::kLanes;
  using O::kPanelN;
  using O::kPanelSplitN;
  using O::steps_of;
  using typename O::C;
  using typename O::Operand;
  using typename O::V;

  static int64_t scratch_bytes(int64_t rows) {
    const int64_t steps = steps_of(smaller(rows, kGradBlockK));
    return Scratch::bytes<C>(kGradBlockM * kGradBlockN) + Scratch::bytes<Operand>(steps * kPanelN) +
           Scratch::bytes<Operand>(steps * kGradBlockM);
  }

  // out [M, N] = left^T right over the rows [begin, end), or with `add` += of the finished sums:
  // M <= kGradBlockM columns of left from left_col, N <= kGradBlockN columns of right from
  // right_col. G: S, or with `add` C too.
  template <class G>
  static void run(
      const Rows& left, int64_t left_col, int64_t M, const Rows& right, int64_t right_col,
      int64_t N, int64_t begin, int64_t end, const DirectStore<G>& out, bool add,
      void* scratch_buffer) {
    Scratch scratch(scratch_buffer);
    C* c = scratch.take<C>(kGradBlockM * kGradBlockN);
    const int64_t block = smaller(end - begin, kGradBlockK);
    Operand* panel = scratch.take<Operand>(steps_of(block) * kPanelN);
    Operand* packed = scratch.take<Operand>(steps_of(block) * kGradBlockM);
    const char* row[kGradBlockM];
    for (int64_t first = begin; first < end; first += block) {
      const int64_t terms = smaller(end - first, block);
      const int64_t steps = steps_of(terms);
      P::straight(
          F::steps(left, first, left_col), M, ceil_div(M, kLanes) * kLanes, terms, packed, kLanes,
          steps * kLanes);
      for (int64_t m = 0; m < M; ++m) {
        row[m] = reinterpret_cast<const char*>(packed + m / kLanes * steps * kLanes + m % kLanes);
      }
      const typename Tile<S>::Rows a{row, M, kLanes * sizeof(Operand), 0, false};
      const bool last = first + terms == end;
      for (int64_t n = 0; n < N; n += kBlockN) {
        const auto b = F::columns(right, first, right_col + n, N - n);
        const int64_t count = smaller(N - n, kBlockN);
        const bool stores_directly = last && count == kBlockN && !add;
        const auto write = [&](const C* sums, int64_t first_row, int64_t rows, int64_t) {
          G* to = out.out + first_row * out.stride + n;
          for (int64_t r = 0; r < rows; ++r, to += out.stride, sums += kBlockN) {
            write_row(sums, count, to, add ? to + kTileM * out.stride : nullptr);
          }
        };
        DirectStore<S> direct;
        if constexpr (std::is_same_v<G, S>) {
          if (stores_directly) direct = {out.out + n, out.stride, out.past};
        }
        Prefetcher prefetcher(reinterpret_cast<const char*>(panel));
        for (int64_t p = 0; p < P::panels_of(b); ++p) {
          P::panel(b, p, 0, terms, panel);
          const bool complete = last && !stores_directly && p + 1 == P::panels_of(b);
          const Epilogue<C> epilogue = complete ? Epilogue<C>(write) : Epilogue<C>();
          Tile<S>::column(
              a, steps, panel, {c + n * M, p * kPanelSplitN, first > begin, epilogue, 0, direct},
              prefetcher);
        }
      }
    }
  }

 private:
  // `count` sums to a row; added if there is a next row to add to, which is fetched: such rows lie
  // far apart, where the hardware's own prefetching does not help.
  template <class G>
  static void write_row(const C* sums, int64_t count, G* to, const G* next) {
    for (int64_t j = 0; j < count; j += kLanes) {
      V value = load<V>(sums + j);
      if (next) {
        __builtin_prefetch(next + j, 1);
        value = value + load<V>(to + j, count - j);
      }
      store(to + j, value, count - j);
    }
  }
};

}  // namespace
}  // namespace moe_ext::cpu::kernels
