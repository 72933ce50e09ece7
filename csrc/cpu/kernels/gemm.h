// Matrix products of a piece: at most max_chunk_rows rows by kPieceCols columns.
//
// The rows of A are read where they lie, through a table of pointers, so gathering costs nothing.
// With many rows B is packed, a block of terms at a time, into a panel that a tile of registers
// runs down. With few rows or columns packing would cost more than it saves: then B is read where
// it lies, and a tile's sums run over the terms by vectors (dot products).
#pragma once

#include "cpu/kernels/ahead.h"
#include "cpu/kernels/operand.h"

namespace moe_ext::kernels {
namespace {

// What happens to rows of a product as soon as they are complete and still in the nearest cache:
// fn(c, first, count, part), c [count, kPieceCols] the rows from `first` on, `part` which of
// several pieces side by side. Refers to fn, does not own it.
template <class C>
class Finish {
 public:
  Finish() = default;
  template <class Fn>
  explicit Finish(const Fn& fn)
      : fn_(&fn), call_([](const void* fn, const C* c, int64_t first, int64_t count, int64_t part) {
          (*static_cast<const Fn*>(fn))(c, first, count, part);
        }) {}
  MOE_INLINE void operator()(const C* c, int64_t first, int64_t count, int64_t part) const {
    if (fn_) call_(fn_, c, first, count, part);
  }

 private:
  const void* fn_ = nullptr;
  void (*call_)(const void*, const C*, int64_t, int64_t, int64_t) = nullptr;
};

template <class S>
struct Gemm {
  using C = typename Storage<S>::Compute;
  using Operand = typename Storage<S>::Operand;
  using V = Vec<C>;
  using Reg = typename V::Reg;
  typedef Operand OperandReg __attribute__((vector_size(MOE_VECTOR_BYTES)));
  static constexpr bool kPairs = Storage<S>::kPairs;
  static constexpr bool kDirect = Storage<S>::kDirect;
  static constexpr int kLanes = V::kLanes;
  static constexpr int kTermsPerStep = kPairs ? 2 : 1;
  static constexpr int kPanelCols = kTileVecs * kLanes;
  static constexpr int kPanelHalf = kPanelCols / 2;
  static constexpr int64_t kMaxRows = kDirect ? 512 : 256;
  static constexpr int64_t kDotTerms = 64 * kLanes * kTermsPerStep;
  // Bytes. The hardware's own prefetching stops at the end of a page.
  static constexpr int64_t kStreamAhead = 3072;

  static int64_t steps_of(int64_t terms) { return (terms + kTermsPerStep - 1) / kTermsPerStep; }

  static MOE_INLINE OperandReg broadcast(Operand x) { return x - OperandReg{}; }

  static MOE_INLINE Reg multiply_add(OperandReg a, OperandReg b, Reg c) {
#if defined(MOE_AVX512_BF16)
    if constexpr (kPairs) {
      return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(b), reinterpret_cast<__m512bh>(a));
    } else {
      return a * b + c;
    }
#else
    return a * b + c;
#endif
  }

  // kLanes operands of consecutive terms, of which `terms` exist; zeros after them.
  static MOE_INLINE OperandReg load_terms(const S* p, int64_t terms) {
    if constexpr (kPairs) {
      if (terms >= 2 * kLanes) return read_as<OperandReg>(p);
      S term[2 * kLanes] = {};
      for (int64_t i = 0; i < terms; ++i) term[i] = p[i];
      return read_as<OperandReg>(term);
    } else {
      return load<V>(p, terms).v;
    }
  }

  // Packing. A packed block is [steps][pitch] operands.

  // `width` (a multiple of kLanes) columns, of which `count` exist, from rows of terms.
  static void pack_transposed(
      const S* data, int64_t n_stride, int64_t count, int64_t width, int64_t terms, Operand* out,
      int64_t pitch) {
    constexpr int64_t kTerms = kLanes * kTermsPerStep;
    for (int64_t n = 0; n < width; n += kLanes, data += kLanes * n_stride, out += kLanes) {
      int64_t k = 0;
      if (n + kLanes <= count) {
        for (; k + kTerms <= terms; k += kTerms) {
          OperandReg square[kLanes];
#pragma GCC unroll 16
          for (int i = 0; i < kLanes; ++i) square[i] = load_terms(data + i * n_stride + k, kTerms);
          transpose(square);
          Operand* to = out + k / kTermsPerStep * pitch;
#pragma GCC unroll 16
          for (int i = 0; i < kLanes; ++i)
            __builtin_memcpy(to + i * pitch, &square[i], sizeof(Reg));
        }
      }
      for (; k < terms; k += kTerms) {
        OperandReg square[kLanes];
        for (int i = 0; i < kLanes; ++i) {
          square[i] = n + i < count ? load_terms(data + i * n_stride + k, terms - k) : OperandReg{};
        }
        transpose(square);
        for (int i = 0; i < smaller(steps_of(terms - k), kLanes); ++i) {
          __builtin_memcpy(out + (k / kTermsPerStep + i) * pitch, &square[i], sizeof(Reg));
        }
      }
    }
  }

  // The same from rows of columns: term k is row k, or row k_index[k]. The vectors of columns of a
  // step lie group_pitch operands apart.
  static void pack_rows(
      const S* data, int64_t k_stride, const int32_t* k_index, int64_t count, int64_t width,
      int64_t terms, Operand* out, int64_t pitch, int64_t group_pitch) {
    constexpr int64_t kFetch = 8;  // rows
    const auto row = [&](int64_t k) { return data + (k_index ? k_index[k] : k) * k_stride; };
    for (int64_t k = 0; k < terms; k += kTermsPerStep) {
      const S* first = row(k);
      const S* second = kPairs && k + 1 < terms ? row(k + 1) : nullptr;
      if (k + kFetch + kTermsPerStep <= terms) {
        for (int i = 0; i < kTermsPerStep; ++i) {
          const char* line = reinterpret_cast<const char*>(row(k + kFetch + i));
          for (int64_t byte = 0; byte < count * static_cast<int64_t>(sizeof(S)); byte += 64) {
            __builtin_prefetch(line + byte);
          }
        }
      }
      Operand* to = out;
      for (int64_t n = 0; n < width; n += kLanes, to += group_pitch) {
        OperandReg packed;
        if constexpr (kPairs) {
          packed = widen(load_half(first + n, count - n));
          if (second) packed |= widen(load_half(second + n, count - n)) << 16;
        } else {
          packed = load<V>(first + n, count - n).v;
        }
        __builtin_memcpy(to, &packed, sizeof(packed));
      }
      out += pitch;
    }
  }
  static MOE_INLINE HalfReg load_half(const S* p, int64_t count) {
    if (count >= kLanes) return read_as<HalfReg>(p);
    S lane[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) lane[i] = p[i];
    return read_as<HalfReg>(lane);
  }

  static void pack_panel(
      const Columns<S>& b, int64_t panel, int64_t first_term, int64_t terms, Operand* out) {
    const int64_t n = panel * kPanelHalf;
    for (int half = 0; half < 2; ++half) {
      const int64_t count = smaller(b.count[half] - n, kPanelHalf);
      Operand* to = out + half * kPanelHalf;
      if (b.k_stride == 1 && !b.k_index) {
        pack_transposed(
            b.data[half] + n * b.n_stride + first_term, b.n_stride, count, kPanelHalf, terms, to,
            kPanelCols);
      } else if (b.k_index) {
        pack_rows(
            b.data[half] + n, b.k_stride, b.k_index + first_term, count, kPanelHalf, terms, to,
            kPanelCols, kLanes);
      } else {
        pack_rows(
            b.data[half] + n + first_term * b.k_stride, b.k_stride, nullptr, count, kPanelHalf,
            terms, to, kPanelCols, kLanes);
      }
    }
  }

  // Where complete rows of kPieceCols go straight from the registers; nowhere if out is null.
  // `past`: past the caches, and then rows are aligned to lines.
  struct Direct {
    S* out;
    int64_t stride;
    bool past;
  };

  // c [kRows, kPieceCols] (+)= a panel: row m's operand of a step lies a_step bytes after that of
  // the step before. `odd`: the last step's second term does not exist in a.
  // Never inlined: its loop needs all the registers, and a caller's variables would take some.
  template <int kRows>
  static MOE_NOINLINE void tile(
      int64_t steps, bool odd, const char* const* a, int64_t a_step, const Operand* panel, C* c,
      bool accumulate, Ahead& ahead, const Direct& direct) {
    Reg sum[kRows][kTileVecs];
    const auto col = [](int j) {
      return j * kLanes + (j < kTileVecs / 2 ? 0 : kHalf - kPanelHalf);
    };
    const auto place = [&](int m, int j) { return c + m * kPieceCols + col(j); };
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
      for (int j = 0; j < kTileVecs; ++j) {
        sum[m][j] = accumulate ? read_as<Reg>(place(m, j)) : Reg{};
      }
    }
    const char* row[kRows];
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) row[m] = a[m];
    int64_t at = 0;
    for (int64_t step = odd ? 1 : 0; step < steps;) {
      auto [line, line_step] = ahead.next();
      for (int64_t last = smaller(step + Ahead::kRun, steps); step < last; ++step) {
        __builtin_prefetch(line, 0, 2);
        line += line_step;
        OperandReg b[kTileVecs];
#pragma GCC unroll 4
        for (int j = 0; j < kTileVecs; ++j) {
          __builtin_prefetch(panel + 4 * kPanelCols + j * kLanes);
          b[j] = read_as<OperandReg>(panel + j * kLanes);
        }
#pragma GCC unroll 8
        for (int m = 0; m < kRows; ++m) {
          const OperandReg x = broadcast(read_as<Operand>(row[m] + at));
#pragma GCC unroll 4
          for (int j = 0; j < kTileVecs; ++j) sum[m][j] = multiply_add(x, b[j], sum[m][j]);
        }
        at += a_step;
        panel += kPanelCols;
      }
    }
    if (odd) {
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) {
        const OperandReg x = broadcast(read_as<uint16_t>(row[m] + at));
#pragma GCC unroll 4
        for (int j = 0; j < kTileVecs; ++j) {
          sum[m][j] = multiply_add(x, read_as<OperandReg>(panel + j * kLanes), sum[m][j]);
        }
      }
    }
    if (direct.out) {
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
        for (int j = 0; j < kTileVecs; ++j) {
          S* to = direct.out + m * direct.stride + col(j);
          direct.past ? stream(to, V(sum[m][j])) : store(to, V(sum[m][j]));
        }
      }
      return;
    }
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
      for (int j = 0; j < kTileVecs; ++j) {
        __builtin_memcpy(place(m, j), &sum[m][j], sizeof(Reg));
      }
    }
  }

  // The tiles of rows [first, rows). a_bytes: the length of a row of a that is to be fetched ahead.
  // c is the panel's place in c_rows [rows, kPieceCols], which `finish` gets.
  template <int kRows = kTileRows>
  static MOE_INLINE void tiles(
      int64_t first, int64_t rows, int64_t steps, bool odd, const char* const* a, int64_t a_step,
      int64_t a_bytes, const Operand* panel, C* c_rows, int64_t panel_col, bool accumulate,
      Ahead& ahead, const Finish<C>& finish, int64_t part, const Direct& direct = {}) {
    for (; first + kRows <= rows; first += kRows) {
      C* c = c_rows + first * kPieceCols;
      ahead.set_rows(a + first + kRows, smaller(rows - first - kRows, kTileRows), a_bytes);
      const Direct rows_out{
          direct.out ? direct.out + first * direct.stride + panel_col : nullptr, direct.stride,
          direct.past};
      tile<kRows>(steps, odd, a + first, a_step, panel, c + panel_col, accumulate, ahead, rows_out);
      finish(c, first, kRows, part);
    }
    if constexpr (kRows > 1) {
      if (first < rows) {
        tiles<kRows - 1>(
            first, rows, steps, odd, a, a_step, a_bytes, panel, c_rows, panel_col, accumulate,
            ahead, finish, part, direct);
      }
    }
  }

  // c (+)= dot products of kRows rows of a (operands) and kCols of b, kParts partial sums for each:
  // few products need several sums each, or every multiply-add would wait for the one before.
  template <int kRows, int kCols, int kParts>
  static MOE_NOINLINE void dot_tile(
      const char* const* a, const S* b, int64_t n_stride, int64_t terms, C* c, bool accumulate,
      Ahead& ahead) {
    constexpr int64_t kTerms = kLanes * kTermsPerStep;
    constexpr int64_t kBytes = kLanes * sizeof(Operand);
    constexpr int kFetch = kCols / 2;  // lines ahead in a step
    constexpr int kSteps = Ahead::kRun / (kFetch > 0 ? kFetch * kParts : 1);
    typedef C Few __attribute__((vector_size(kCols * sizeof(C))));
    Reg sum[kParts][kRows][kCols] = {};
    int64_t k = 0, at = 0;
    while (k + kParts * kTerms <= terms) {
      auto [line, line_step] = kFetch > 0 ? ahead.next() : Ahead::Run{};
      for (int s = 0; s < kSteps && k + kParts * kTerms <= terms; ++s) {
#pragma GCC unroll 4
        for (int p = 0; p < kParts; ++p, k += kTerms, at += kBytes) {
          OperandReg w[kCols];
          if (kFetch == 0) {
            __builtin_prefetch(reinterpret_cast<const char*>(b + k) + kStreamAhead, 0, 2);
          }
#pragma GCC unroll 4
          for (int n = 0; n < kCols; ++n) {
            if (n < kFetch) {
              __builtin_prefetch(line, 0, 2);
              line += line_step;
            }
            w[n] = load_terms(b + n * n_stride + k, kTerms);
          }
#pragma GCC unroll 8
          for (int m = 0; m < kRows; ++m) {
            const OperandReg x = read_as<OperandReg>(a[m] + at);
#pragma GCC unroll 4
            for (int n = 0; n < kCols; ++n) sum[p][m][n] = multiply_add(x, w[n], sum[p][m][n]);
          }
        }
      }
    }
    for (; k < terms; k += kTerms, at += kBytes) {
      const int64_t left = smaller(terms - k, kTerms);
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) {
        OperandReg x;
        if (left == kTerms) {
          x = read_as<OperandReg>(a[m] + at);
        } else {
          Operand rest[kLanes] = {};
          __builtin_memcpy(rest, a[m] + at, left * (sizeof(Operand) / kTermsPerStep));
          x = read_as<OperandReg>(rest);
        }
#pragma GCC unroll 4
        for (int n = 0; n < kCols; ++n) {
          sum[0][m][n] = multiply_add(x, load_terms(b + n * n_stride + k, left), sum[0][m][n]);
        }
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m, c += kPieceCols) {
#pragma GCC unroll 4
      for (int p = 1; p < kParts; ++p) {
#pragma GCC unroll 4
        for (int n = 0; n < kCols; ++n) sum[0][m][n] += sum[p][m][n];
      }
      Few sums = first_lanes<Few>(lane_sums(sum[0][m]));
      if (accumulate) sums += read_as<Few>(c);
      __builtin_memcpy(c, &sums, sizeof(Few));
    }
  }
  // All columns of b with kRows rows of a.
  template <int kRows>
  static void dot_strip(
      const char* const* a, const Columns<S>& b, int64_t first, int64_t terms, bool stream, C* c,
      Ahead& ahead) {
    constexpr int kParts = kRows >= 4 ? 1 : 4 / kRows;
    for (int half = 0; half < 2; ++half, c += kHalf) {
      const S* data = b.data[half] + first;
      const auto col = [&](int64_t n) { return data + n * b.n_stride; };
      int64_t n = 0;
      for (; !stream && n + kTileVecs <= b.count[half]; n += kTileVecs) {
        dot_tile<kRows, kTileVecs, 1>(a, col(n), b.n_stride, terms, c + n, first > 0, ahead);
      }
      for (; n < b.count[half]; ++n) {
        dot_tile<kRows, 1, kParts>(a, col(n), b.n_stride, terms, c + n, first > 0, ahead);
      }
    }
  }
  // Two at least, so that one pass over b leaves time to fetch the next.
  static int64_t strips_of(int64_t rows) {
    return larger((rows + kTileRows - 1) / kTileRows, smaller(rows, 2));
  }
  // c (+)= dot products of all rows and columns over the terms [first, first + terms), which a
  // begins with, in `strips` strips of kRows or fewer rows, as even as can be. `stream`: one column
  // at a time, so that b is read from memory in one stream.
  template <int kRows = kTileRows>
  static void dots(
      const char* const* a, int64_t rows, int64_t strips, const Columns<S>& b, int64_t first,
      int64_t terms, bool stream, C* c, Ahead& ahead) {
    for (; rows > (kRows - 1) * strips; --strips, rows -= kRows, a += kRows) {
      dot_strip<kRows>(a, b, first, terms, stream, c, ahead);
      c += kRows * kPieceCols;
    }
    if constexpr (kRows > 1) {
      if (rows > 0) dots<kRows - 1>(a, rows, strips, b, first, terms, stream, c, ahead);
    }
  }

  static int64_t scratch_bytes(int64_t rows, int64_t terms, int64_t parts) {
    const int64_t block = smaller(terms, kMaxTerms);
    const int64_t dot_rows = smaller(rows, kMaxDotRows) * row_pitch(smaller(terms, kDotTerms));
    const int64_t packed_rows = kDirect ? 0 : rows * row_pitch(block);
    const int64_t copied = larger(larger(dot_rows, packed_rows), row_pitch(terms));
    return Scratch::bytes<C>(parts * rows * kPieceCols) +
           Scratch::bytes<Operand>(steps_of(block) * kPanelCols) + Scratch::bytes<char>(copied);
  }

  // Bytes of a copied row of a: whole vectors, and never rows at equal places of a page, which
  // would drive each other out of the nearest cache.
  static int64_t row_pitch(int64_t terms) {
    const int64_t bytes = steps_of(terms) * static_cast<int64_t>(sizeof(Operand));
    return (bytes + MOE_VECTOR_BYTES - 1) / MOE_VECTOR_BYTES * MOE_VECTOR_BYTES + 64;
  }

  // Terms [first, first + count) of a row as operands.
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

  // Dot products end in sums over lanes, which must not outweigh the terms.
  static int64_t max_dot_rows(int64_t terms) {
    const int64_t vectors = terms / (kLanes * kTermsPerStep);
    return larger(smaller(vectors / 4 * kTileRows, kMaxDotRows), 1);
  }

  // For each of `parts` pieces side by side: c [rows, kPieceCols] = rows of a times b[part], over
  // `terms`, goes to `finish`; columns that b does not have are undefined. `next` may name the b of
  // the next product, to be fetched ahead.
  static void multiply(
      const S* const* a, int64_t rows, int64_t terms, const Columns<S>* b, int64_t parts,
      const Columns<S>* next, void* scratch_buffer, const Finish<C>& finish) {
    const bool dot =
        b->k_stride == 1 && (rows <= max_dot_rows(terms) || (kDirect && b->size() <= kMaxDotCols));
    const bool stream = dot && rows == 1;
    const bool copies = !kDirect || (dot && !stream && rows <= max_dot_rows(terms));
    const int64_t block = smaller(
        terms, stream      ? terms
               : dot       ? kDotTerms
               : parts > 1 ? kMaxWideTerms
                           : kMaxTerms);
    Scratch scratch(scratch_buffer);
    C* c = scratch.take<C>(parts * rows * kPieceCols);
    Operand* panel = dot ? nullptr : scratch.take<Operand>(steps_of(block) * kPanelCols);
    char* copied = copies ? scratch.take<char>(rows * row_pitch(block)) : nullptr;
    const char* row[kMaxRows];
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
      Ahead ahead(reinterpret_cast<const char*>(c));
      const bool last = first + count == terms;
      const int64_t row_bytes = count * static_cast<int64_t>(sizeof(Operand)) / kTermsPerStep;
      if (!stream && !(last && !next)) {
        const int64_t coming = last ? smaller(terms, block) : smaller(terms - first - count, block);
        fetch_block(
            last ? next : b, parts, last ? 0 : first + count, coming,
            parts * (dot ? dot_calls(rows, count) : tile_calls(rows, count, row_bytes)), ahead);
      }
      for (int64_t part = 0; part < parts; ++part) {
        C* c_part = c + part * rows * kPieceCols;
        if (dot) {
          dots(row, rows, strips_of(rows), b[part], first, count, stream, c_part, ahead);
          if (last) finish(c_part, 0, rows, part);
          continue;
        }
        const int64_t panels = panels_of(b[part]);
        for (int64_t p = 0; p < panels; ++p) {
          pack_panel(b[part], p, first, count, panel);
          tiles(
              0, rows, steps_of(count), kPairs && count % 2, row, sizeof(Operand), row_bytes, panel,
              c_part, p * kPanelHalf, first > 0, ahead,
              last && p + 1 == panels ? finish : Finish<C>(), part);
        }
      }
    }
  }

  // Panels that hold any of b's columns.
  static int64_t panels_of(const Columns<S>& b) {
    return (larger(b.count[0], b.count[1]) + kPanelHalf - 1) / kPanelHalf;
  }

  static int64_t grad_scratch_bytes(int64_t terms) {
    const int64_t steps = steps_of(smaller(terms, kMaxGradTerms));
    return Scratch::bytes<C>(kGradRows * kGradCols) + Scratch::bytes<Operand>(steps * kPanelCols) +
           Scratch::bytes<Operand>(steps * kGradRows);
  }

  // out [M, N] = left^T right over the rows [begin, end): M <= kGradRows columns of left from
  // left_col, N <= kGradCols columns of right from right_col.
  static void multiply_transposed(
      const Rows& left, int64_t left_col, int64_t M, const Rows& right, int64_t right_col,
      int64_t N, int64_t begin, int64_t end, const Direct& out, void* scratch_buffer) {
    Scratch scratch(scratch_buffer);
    C* c = scratch.take<C>(kGradRows * kGradCols);
    const int64_t block = smaller(end - begin, kMaxGradTerms);
    Operand* panel = scratch.take<Operand>(steps_of(block) * kPanelCols);
    Operand* packed = scratch.take<Operand>(steps_of(block) * kGradRows);
    const auto from = [](const Rows& rows, int64_t row, int64_t col) {
      return static_cast<const S*>(rows.data) + (rows.index ? 0 : row * rows.stride) + col;
    };
    const auto index_from = [](const Rows& rows, int64_t row) {
      return rows.index ? rows.index + row : nullptr;
    };
    const char* row[kGradRows];
    for (int64_t first = begin; first < end; first += block) {
      const int64_t terms = smaller(end - first, block);
      const int64_t steps = steps_of(terms);
      pack_rows(
          from(left, first, left_col), left.stride, index_from(left, first), M,
          (M + kLanes - 1) / kLanes * kLanes, terms, packed, kLanes, steps * kLanes);
      for (int64_t m = 0; m < M; ++m) {
        row[m] = reinterpret_cast<const char*>(packed + m / kLanes * steps * kLanes + m % kLanes);
      }
      for (int64_t n = 0; n < N; n += kPieceCols) {
        const S* data = from(right, first, right_col + n);
        const Columns<S> b = neighbours(data, N - n, 1, right.stride, index_from(right, first));
        const bool whole = N - n >= kPieceCols;
        const auto store_rows = [&](const C* rows, int64_t first_row, int64_t count, int64_t) {
          S* to = out.out + first_row * out.stride + n;
          for (int64_t r = 0; r < count; ++r, to += out.stride, rows += kPieceCols) {
            for (int64_t j = 0; j < N - n; j += kLanes) store(to + j, load<V>(rows + j), N - n - j);
          }
        };
        Ahead ahead(reinterpret_cast<const char*>(panel));
        for (int64_t p = 0; p < panels_of(b); ++p) {
          pack_panel(b, p, 0, terms, panel);
          const bool last = first + terms == end;
          const bool finishes = last && !whole && p + 1 == panels_of(b);
          tiles(
              0, M, steps, false, row, kLanes * sizeof(Operand), 0, panel, c + n * M,
              p * kPanelHalf, first > begin, ahead, finishes ? Finish<C>(store_rows) : Finish<C>(),
              0, last && whole ? Direct{out.out + n, out.stride, out.past} : Direct{});
        }
      }
    }
  }

 private:
  // Calls of Ahead::next while a whole piece is computed, without those that the rows take.
  static int64_t calls_for(int64_t lines) { return (lines + Ahead::kRun - 1) / Ahead::kRun; }
  static int64_t tile_calls(int64_t rows, int64_t terms, int64_t row_bytes) {
    const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
    return kHalf / kPanelHalf *
           (tiles * calls_for(steps_of(terms)) - rows * calls_for((row_bytes + 63) / 64));
  }
  static int64_t dot_calls(int64_t rows, int64_t terms) {
    const int64_t vectors = terms / (kLanes * kTermsPerStep);
    return strips_of(rows) * (kPieceCols / kTileVecs) * calls_for(vectors * kTileVecs / 2);
  }

  // Names the block of `terms` terms of b from `first` on, to be fetched in `calls` calls.
  static void fetch_block(
      const Columns<S>* b, int64_t parts, int64_t first, int64_t terms, int64_t calls,
      Ahead& ahead) {
    constexpr int64_t kElement = sizeof(S);
    constexpr int64_t kBytes = 64 * Ahead::kRun;
    const auto lines = [](int64_t columns) { return (columns * kElement + 63) / 64; };
    Ahead::Runs runs[2];
    for (int half = 0; half < 2; ++half) {
      const auto at = reinterpret_cast<const char*>(b->data[half] + first * b->k_stride);
      if (b->k_stride == 1 && b->n_stride == terms) {  // all in one
        const int64_t all_runs = (b->count[half] * terms * kElement + kBytes - 1) / kBytes;
        runs[half] = {at, all_runs, kBytes, 1, 0, 64};
      } else if (b->k_stride == 1) {
        const int64_t row_runs = (terms * kElement + kBytes - 1) / kBytes;
        runs[half] = {at, b->count[half], b->n_stride * kElement, row_runs, kBytes, 64};
      } else {
        // Neighbouring lines together; with several parts one run of lines serves them all.
        const int64_t step = b->k_stride * kElement;
        const int64_t width =
            parts > 1 ? half == 0 ? lines(parts * kPieceCols) : 0 : lines(b->count[half]);
        const int64_t row_runs = (terms + Ahead::kRun - 1) / Ahead::kRun;
        runs[half] = {at, width, 64, row_runs, Ahead::kRun * step, step};
      }
    }
    ahead.set_block(runs, calls);
  }
};

}  // namespace
}  // namespace moe_ext::kernels
