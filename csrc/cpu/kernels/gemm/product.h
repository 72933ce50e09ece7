// The product A W^T of a block: at most kBlockM rows by kBlockN columns, over all terms, then its
// epilogue.
//
// The rows of A are read where they lie, through a table of pointers, so gathering costs nothing.
// With many rows W is packed, a block of terms at a time, into a panel that tiles run down.
#pragma once

#include <type_traits>

#include "cpu/kernels/gemm/dots.h"
#include "cpu/kernels/gemm/pack.h"
#include "cpu/kernels/gemm/squares.h"
#include "cpu/kernels/gemm/strips.h"
#include "cpu/kernels/gemm/tile.h"
#include "cpu/kernels/scratch.h"

namespace moe_ext::cpu::kernels {
namespace {

// A, W: the formats of both operands, which are multiplied as one kind of operand. A is dense: its
// rows are read where they lie.
template <class A, class W>
struct Product : A::Operands {
  static_assert(std::is_same_v<typename A::Operands, typename W::Operands>);
  using O = typename A::Operands;
  using S = typename A::Stored;
  using Columns = typename W::Columns;
  using O::kDirect;
  using O::kLanes;
  using O::kPairs;
  using O::kPanelN;
  using O::kPanelSplitN;
  using O::kTermsPerStep;
  using O::steps_of;
  using typename O::C;
  using typename O::Operand;
  using typename O::V;

  static constexpr int64_t kBlockM = kDirect ? kMaxBlockM : kMaxCopiedBlockM;

  static int64_t scratch_bytes(int64_t rows, int64_t terms, int64_t n_blocks) {
    const int64_t block = smaller(terms, kBlockK);
    const int64_t dot_rows =
        smaller(rows, kMaxDotM) * row_pitch(smaller(terms, Dots<W>::kBlockTerms));
    const int64_t packed_rows = kDirect ? 0 : rows * row_pitch(block);
    const int64_t whole_rows = smaller(rows, Squares<W>::kMaxM) * row_pitch(terms);
    const int64_t copied = larger(larger(dot_rows, packed_rows), whole_rows);
    const int64_t panel = W::kLiesInPanels ? 0 : steps_of(block) * kPanelN;
    return Scratch::bytes<C>(n_blocks * rows * kBlockN) + Scratch::bytes<Operand>(panel) +
           Scratch::bytes<char>(copied);
  }

  // For each of n_blocks blocks of columns side by side: c [rows, kBlockN] = rows of a times
  // w[n_block], over `terms`, goes to the epilogue; columns that w does not have are undefined.
  // `expert_rows`: RowBlock. `next` may name the blocks of the next product, to be fetched ahead.
  static void run(
      const S* const* a, int64_t rows, int64_t expert_rows, int64_t terms, const Columns* w,
      int64_t n_blocks, const Columns* next, void* scratch_buffer, const Epilogue<C>& epilogue) {
    const Path path = path_of(rows, expert_rows, terms, *w);
    const bool copies = copies_rows(path, rows, terms);
    const int64_t block = smaller(terms, most_terms(path, rows, terms, n_blocks));
    Scratch scratch(scratch_buffer);
    C* c = scratch.take<C>(n_blocks * rows * kBlockN);
    const bool packs = path == Path::kTiles && !W::kLiesInPanels;
    Operand* panel = packs ? scratch.take<Operand>(steps_of(block) * kPanelN) : nullptr;
    char* copied = copies ? scratch.take<char>(rows * row_pitch(block)) : nullptr;
    const char* row[kBlockM];
    for (int64_t first = 0; first < terms; first += block) {
      const int64_t count = smaller(terms - first, block);
      for (int64_t m = 0; m < rows; ++m) {
        row[m] = reinterpret_cast<const char*>(a[m] + first);
        if (copies) {
          char* to = copied + m * row_pitch(block);
          copy_row(a[m] + first, count, to);
          row[m] = to;
        }
      }
      Prefetcher prefetcher(reinterpret_cast<const char*>(c));
      const bool last = first + count == terms;
      const int64_t row_bytes = count * static_cast<int64_t>(sizeof(Operand)) / kTermsPerStep;
      if ((path == Path::kTiles || path == Path::kDots) && !(last && !next)) {
        const int64_t coming = last ? smaller(terms, block) : smaller(terms - first - count, block);
        const int64_t calls =
            path == Path::kTiles ? tile_calls(rows, count, row_bytes) : dot_calls(rows, count);
        Prefetcher::LineGrid grids[2];
        W::line_grids(last ? *next : *w, n_blocks, last ? 0 : first + count, coming, grids);
        prefetcher.set_block(grids, n_blocks * calls);
      }
      for (int64_t n_block = 0; n_block < n_blocks; ++n_block) {
        C* c_block = c + n_block * rows * kBlockN;
        if constexpr (W::kHasTerms) {
          if (path != Path::kTiles) {
            if (path == Path::kStream) {
              Dots<W>::stream(row, w[n_block], first, count, c_block, prefetcher);
            } else if (path == Path::kSquares) {
              Squares<W>::block(row, rows, w[n_block], terms, c_block);
            } else if (path == Path::kStrips) {
              const int64_t after = first + count;
              const int64_t coming = smaller(terms - after, block);
              Strips<W>::block(
                  row, rows, {w[n_block], first, count},
                  last
                      ? typename Strips<W>::
                            Block{next ? next[n_block] : w[n_block], 0, next ? smaller(terms, block) : 0}
                      : typename Strips<W>::Block{w[n_block], after, coming},
                  c_block);
            } else {
              Dots<W>::block(
                  row, rows, Dots<W>::m_tiles_of(rows), w[n_block], first, count, c_block,
                  prefetcher);
            }
            if (last) epilogue(c_block, 0, rows, n_block);
            continue;
          }
        }
        const typename Tile<S>::Rows a_rows{
            row, rows, sizeof(Operand), row_bytes, kPairs && count % 2};
        const int64_t panels = Pack<W>::panels_of(w[n_block]);
        for (int64_t p = 0; p < panels; ++p) {
          const Operand* b = panel;
          if constexpr (W::kLiesInPanels) {
            b = W::panel(w[n_block], p, first);
          } else {
            Pack<W>::panel(w[n_block], p, first, count, panel);
          }
          const bool complete = last && p + 1 == panels;
          Tile<S>::template column<W::kLiesInPanels>(
              a_rows, steps_of(count), b,
              {c_block, p * kPanelSplitN, first > 0, complete ? epilogue : Epilogue<C>(), n_block},
              prefetcher);
        }
      }
    }
  }

 private:
  // kTiles: W is packed. kStrips: few rows; columns are read where they lie side by side. kDots: it
  // is read where it lies. kStream: so it is, a column at a time over all terms, in one stream from
  // memory. kSquares: few of an expert's many rows. Each has one order of summing, whatever the
  // rows, columns and terms that are taken at once:
  // - kTiles, kStrips, kSquares: a chain of multiply-adds over the terms, also across blocks of
  // them;
  // - kDots: such a chain in each lane, then the sum of the lanes, for every kBlockTerms terms;
  // - kStream: several chains in each lane over all terms, then the sum of all.
  enum class Path { kTiles, kStrips, kSquares, kDots, kStream };

  // Between different orders only the expert's rows may choose.
  static Path path_of(int64_t rows, int64_t expert_rows, int64_t terms, const Columns& w) {
    const bool few = expert_rows <= Dots<W>::max_m(terms) || (kDirect && w.size() <= kMaxDotN);
    if (!w.has_dense_terms()) {
      return W::kHasTerms && rows <= Strips<W>::kMaxM ? Path::kStrips : Path::kTiles;
    }
    if (!few) return rows <= Squares<W>::kMaxM ? Path::kSquares : Path::kTiles;
    return expert_rows == 1 ? Path::kStream : Path::kDots;
  }

  // Rows are copied where they must be widened, and for dot products, which go over them once for
  // every few columns.
  static bool copies_rows(Path path, int64_t rows, int64_t terms) {
    return !kDirect || (path == Path::kDots && rows <= Dots<W>::max_m(terms));
  }

  static int64_t most_terms(Path path, int64_t rows, int64_t terms, int64_t n_blocks) {
    if (path == Path::kStream || path == Path::kSquares) return terms;
    // One tile reads a panel once, so it need not stay in a cache.
    if (W::kLiesInPanels && kPanelN == kBlockN && rows <= kTileM) return terms;
    if (path == Path::kDots) return Dots<W>::kBlockTerms;
    if (path == Path::kStrips) return Strips<W>::kBlockTerms;
    return n_blocks > 1 ? kWideBlockK : kBlockK;
  }

  // Bytes of a copied row of a: whole vectors, and never rows at equal places of a page, which
  // would drive each other out of the nearest cache.
  static int64_t row_pitch(int64_t terms) {
    const int64_t bytes = steps_of(terms) * static_cast<int64_t>(sizeof(Operand));
    return ceil_div(bytes, MOE_VECTOR_BYTES) * MOE_VECTOR_BYTES + 64;
  }

  // `count` terms of a row as operands.
  static void copy_row(const S* a, int64_t count, char* to) {
    if constexpr (kDirect) {
      __builtin_memcpy(to, a, count * sizeof(S));
    } else {
      Operand* out = reinterpret_cast<Operand*>(to);
      for (int64_t k = 0; k < count; k += kLanes) {
        store(out + k, load<V>(a + k, count - k), count - k);
      }
    }
  }

  // Calls of Prefetcher::next while a whole block is computed, without those that the rows take.
  static int64_t calls_for(int64_t lines) { return ceil_div(lines, Prefetcher::kLinesPerCall); }
  static int64_t tile_calls(int64_t rows, int64_t terms, int64_t row_bytes) {
    const int64_t tiles = ceil_div(rows, kTileM);
    return kSplitN / kPanelSplitN *
           (tiles * calls_for(steps_of(terms)) - rows * calls_for(ceil_div(row_bytes, 64)));
  }
  static int64_t dot_calls(int64_t rows, int64_t terms) {
    const int64_t vectors = terms / (kLanes * kTermsPerStep);
    return Dots<W>::m_tiles_of(rows) * (kBlockN / kTileVecs) * calls_for(vectors * kTileVecs / 2);
  }
};

}  // namespace
}  // namespace moe_ext::cpu::kernels
