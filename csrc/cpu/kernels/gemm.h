// Matrix products of a piece: at most max_chunk_rows rows by kPieceCols columns.
//
// The rows of A are read where they lie, through a table of pointers, so gathering costs nothing.
// B is packed, a block of terms at a time, into a panel that a tile of registers runs down. With
// few rows or columns packing would cost more than it saves: then both are read where they lie and
// every element is a dot product.
//
// Operands: fp32 and fp64 as they are; bf16 as pairs of terms where the machine multiplies pairs;
// otherwise bf16 and fp16 are widened to fp32 (exactly) while packing.
#pragma once

#include "cpu/kernels/vec.h"

namespace moe_ext::kernels {
namespace {

template <class S>
struct Storage {
  using Compute = float;
  using Operand = float;
  static constexpr bool kPairs = false;   // an operand holds two terms
  static constexpr bool kDirect = false;  // rows of A are operands as they lie
};
template <>
struct Storage<float> {
  using Compute = float;
  using Operand = float;
  static constexpr bool kPairs = false;
  static constexpr bool kDirect = true;
};
template <>
struct Storage<double> {
  using Compute = double;
  using Operand = double;
  static constexpr bool kPairs = false;
  static constexpr bool kDirect = true;
};
#if defined(MOE_AVX512_BF16)
template <>
struct Storage<bf16> {
  using Compute = float;
  using Operand = uint32_t;
  static constexpr bool kPairs = true;
  static constexpr bool kDirect = true;
};
#endif

#if MOE_VECTOR_BYTES == 64
constexpr int kTileRows = 6;
constexpr int kTileVecs = 4;
#elif MOE_VECTOR_BYTES == 32
constexpr int kTileRows = 6;
constexpr int kTileVecs = 2;
#else
constexpr int kTileRows = 4;
constexpr int kTileVecs = 2;
#endif

constexpr int64_t kMaxTerms = 512;      // of a packed block
constexpr int64_t kMaxGradTerms = 256;  // of a packed block of tokens
constexpr int64_t kHalf = kPieceCols / 2;
constexpr int64_t kMaxDotRows = 16;
constexpr int64_t kMaxDotCols = 16;

MOE_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
MOE_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// The B operand of a piece: its columns are two runs (gate and up, or simply neighbours).
template <class S>
struct Columns {
  const S* data[2];
  int64_t count[2];  // 0 to kHalf
  int64_t n_stride, k_stride;
  const int32_t* k_index;  // gathers the terms; needs n_stride == 1
  int64_t size() const { return count[0] + count[1]; }
};

// Hands out parts of a buffer, each aligned to a cache line.
class Scratch {
 public:
  explicit Scratch(void* buffer) : at_(static_cast<char*>(buffer)) {}
  template <class T>
  T* take(int64_t count) {
    T* part = reinterpret_cast<T*>(at_);
    at_ += bytes<T>(count);
    return part;
  }
  template <class T>
  static constexpr int64_t bytes(int64_t count) {
    return (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
  }

 private:
  char* at_;
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

  static int64_t steps_of(int64_t terms) { return (terms + kTermsPerStep - 1) / kTermsPerStep; }

  static MOE_INLINE OperandReg broadcast(Operand x) { return OperandReg{} + x; }

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
    const int64_t steps = steps_of(terms);
    for (int64_t n = 0; n < width; n += kLanes) {
      for (int64_t step = 0; step < steps; step += kLanes) {
        const int64_t left = terms - step * kTermsPerStep;
        OperandReg rows[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          rows[i] = n + i < count
                        ? load_terms(data + (n + i) * n_stride + step * kTermsPerStep, left)
                        : OperandReg{};
        }
        transpose_round<1>(rows);
        Operand* to = out + step * pitch + n;
        if (steps - step >= kLanes) {
#pragma GCC unroll 16
          for (int i = 0; i < kLanes; ++i) __builtin_memcpy(to + i * pitch, &rows[i], sizeof(Reg));
        } else {
          for (int i = 0; i < steps - step; ++i) {
            __builtin_memcpy(to + i * pitch, &rows[i], sizeof(Reg));
          }
        }
      }
    }
  }

  // The same from rows of columns: term k is row k, or row k_index[k].
  static void pack_rows(
      const S* data, int64_t k_stride, const int32_t* k_index, int64_t count, int64_t width,
      int64_t terms, Operand* out, int64_t pitch) {
    const auto row = [&](int64_t k) { return data + (k_index ? k_index[k] : k) * k_stride; };
    for (int64_t k = 0; k < terms; k += kTermsPerStep) {
      const S* first = row(k);
      const S* second = kPairs && k + 1 < terms ? row(k + 1) : nullptr;
      for (int64_t n = 0; n < width; n += kLanes) {
        OperandReg packed;
        if constexpr (kPairs) {
          packed = widen(load_half(first + n, count - n));
          if (second) packed |= widen(load_half(second + n, count - n)) << 16;
        } else {
          packed = load<V>(first + n, count - n).v;
        }
        __builtin_memcpy(out + n, &packed, sizeof(packed));
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
            kPanelCols);
      } else {
        pack_rows(
            b.data[half] + n + first_term * b.k_stride, b.k_stride, nullptr, count, kPanelHalf,
            terms, to, kPanelCols);
      }
    }
  }

  // c [kRows, kPieceCols] (+)= a panel: row m's operand of a step lies a_step bytes after that of
  // the step before. `odd`: the last step's second term does not exist in a.
  template <int kRows>
  static void tile(
      int64_t steps, bool odd, const char* const* a, int64_t a_step, const Operand* panel, C* c,
      bool accumulate) {
    Reg sum[kRows][kTileVecs];
    const auto place = [&](int m, int j) {
      return c + m * kPieceCols + j * kLanes + (j < kTileVecs / 2 ? 0 : kHalf - kPanelHalf);
    };
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
    const Operand* const end = panel + (odd ? steps - 1 : steps) * kPanelCols;
    for (; panel != end; panel += kPanelCols) {
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
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
      for (int j = 0; j < kTileVecs; ++j) {
        __builtin_memcpy(place(m, j), &sum[m][j], sizeof(Reg));
      }
    }
  }

  // The tiles of `rows` rows.
  template <int kRows = kTileRows>
  static MOE_INLINE void tiles(
      int64_t rows, int64_t steps, bool odd, const char* const* a, int64_t a_step,
      const Operand* panel, C* c, bool accumulate) {
    for (; rows >= kRows; rows -= kRows, a += kRows, c += kRows * kPieceCols) {
      tile<kRows>(steps, odd, a, a_step, panel, c, accumulate);
    }
    if constexpr (kRows > 1) {
      if (rows > 0) tiles<kRows - 1>(rows, steps, odd, a, a_step, panel, c, accumulate);
    }
  }

  // Dot products of kRows rows of a (operands) and kCols of b.
  template <int kRows, int kCols>
  static MOE_INLINE void dot_tile(
      const char* const* a, const S* b, int64_t n_stride, int64_t terms, C* c) {
    Reg sum[kRows][kCols] = {};
    constexpr int64_t kTerms = kLanes * kTermsPerStep;
    constexpr int64_t kBytes = kLanes * sizeof(Operand);
    int64_t k = 0, at = 0;
    for (; k + kTerms <= terms; k += kTerms, at += kBytes) {
      OperandReg x[kRows];
#pragma GCC unroll 4
      for (int m = 0; m < kRows; ++m) x[m] = read_as<OperandReg>(a[m] + at);
#pragma GCC unroll 8
      for (int n = 0; n < kCols; ++n) {
        const OperandReg w = load_terms(b + n * n_stride + k, kTerms);
#pragma GCC unroll 4
        for (int m = 0; m < kRows; ++m) sum[m][n] = multiply_add(x[m], w, sum[m][n]);
      }
    }
    if (k < terms) {
      for (int m = 0; m < kRows; ++m) {
        Operand rest[kLanes] = {};
        __builtin_memcpy(rest, a[m] + at, (terms - k) * (sizeof(Operand) / kTermsPerStep));
        const OperandReg x = read_as<OperandReg>(rest);
        for (int n = 0; n < kCols; ++n) {
          sum[m][n] = multiply_add(x, load_terms(b + n * n_stride + k, terms - k), sum[m][n]);
        }
      }
    }
#pragma GCC unroll 4
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
      for (int n = 0; n < kCols; ++n) c[m * kPieceCols + n] = kernels::sum(V(sum[m][n]));
    }
  }
  template <int kCols>
  static MOE_INLINE void dot_rows(
      const char* const* a, int64_t rows, const S* b, int64_t n_stride, int64_t terms, C* c) {
    int64_t m = 0;
    for (; m + 4 <= rows; m += 4) {
      dot_tile<4, kCols>(a + m, b, n_stride, terms, c + m * kPieceCols);
    }
    for (; m + 2 <= rows; m += 2) {
      dot_tile<2, kCols>(a + m, b, n_stride, terms, c + m * kPieceCols);
    }
    if (m < rows) dot_tile<1, kCols>(a + m, b, n_stride, terms, c + m * kPieceCols);
  }
  static void dots(const char* const* a, int64_t rows, const Columns<S>& b, int64_t terms, C* c) {
    for (int half = 0; half < 2; ++half) {
      C* to = c + half * kHalf;
      int64_t n = 0;
      const S* data = b.data[half];
      for (; n + 4 <= b.count[half]; n += 4) {
        dot_rows<4>(a, rows, data + n * b.n_stride, b.n_stride, terms, to + n);
      }
      for (; n < b.count[half]; ++n) {
        dot_rows<1>(a, rows, data + n * b.n_stride, b.n_stride, terms, to + n);
      }
    }
  }

  static int64_t scratch_bytes(int64_t rows, int64_t terms) {
    const int64_t block = smaller(terms, kMaxTerms);
    const int64_t widened = larger(rows * block, smaller(rows, kMaxDotRows) * terms);
    return Scratch::bytes<C>(rows * kPieceCols) +
           Scratch::bytes<Operand>(steps_of(block) * kPanelCols) +
           (kDirect ? 0 : Scratch::bytes<Operand>(widened));
  }

  // c [rows, kPieceCols] = rows of a times b, over `terms`; columns that b does not have are
  // undefined. Returns c, which lies in the scratch.
  static C* multiply(
      const S* const* a, int64_t rows, int64_t terms, const Columns<S>& b, void* scratch_buffer) {
    const bool dot =
        b.k_stride == 1 && (rows <= kMaxDotRows || (kDirect && b.size() <= kMaxDotCols));
    const int64_t block = dot ? terms : smaller(terms, kMaxTerms);
    Scratch scratch(scratch_buffer);
    C* c = scratch.take<C>(rows * kPieceCols);
    Operand* panel = dot ? nullptr : scratch.take<Operand>(steps_of(block) * kPanelCols);
    Operand* widened = kDirect ? nullptr : scratch.take<Operand>(rows * block);
    const char* row[kMaxRows];
    for (int64_t first = 0; first < terms; first += block) {
      const int64_t count = smaller(terms - first, block);
      for (int64_t m = 0; m < rows; ++m) {
        if constexpr (kDirect) {
          row[m] = reinterpret_cast<const char*>(a[m] + first);
        } else {
          Operand* to = widened + m * block;
          for (int64_t k = 0; k < count; k += kLanes) {
            store(to + k, load<V>(a[m] + first + k, count - k), count - k);
          }
          row[m] = reinterpret_cast<const char*>(to);
        }
      }
      if (dot) {
        dots(row, rows, b, count, c);
      } else {
        multiply_block(row, rows, first, count, b, panel, c);
      }
    }
    return c;
  }

  static int64_t grad_scratch_bytes(int64_t terms) {
    const int64_t steps = steps_of(smaller(terms, kMaxGradTerms));
    return Scratch::bytes<C>(kGradRows * kGradCols) + Scratch::bytes<Operand>(steps * kPanelCols) +
           Scratch::bytes<Operand>(steps * kGradRows);
  }

  // c [2, M, kPieceCols] = left^T right over the rows [begin, end): M <= kGradRows columns of left
  // from left_col, N <= kGradCols columns of right from right_col. Returns c, in the scratch.
  static C* multiply_transposed(
      const Rows& left, int64_t left_col, int64_t M, const Rows& right, int64_t right_col,
      int64_t N, int64_t begin, int64_t end, void* scratch_buffer) {
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
      for (int64_t m = 0; m < M; m += kLanes) {
        Operand* group = packed + m * steps;
        pack_rows(
            from(left, first, left_col + m), left.stride, index_from(left, first), M - m, kLanes,
            terms, group, kLanes);
        for (int64_t i = 0; i < smaller(M - m, kLanes); ++i) {
          row[m + i] = reinterpret_cast<const char*>(group + i);
        }
      }
      for (int64_t n = 0; n < N; n += kPieceCols) {
        const S* data = from(right, first, right_col + n);
        const Columns<S> b{
            {data, data + kHalf},
            {smaller(N - n, kHalf), larger(smaller(N - n - kHalf, kHalf), 0)},
            1,
            right.stride,
            index_from(right, first)};
        for (int64_t p = 0; p * kPanelHalf < kHalf; ++p) {
          if (b.count[0] <= p * kPanelHalf) continue;
          pack_panel(b, p, 0, terms, panel);
          tiles(
              M, steps, false, row, kLanes * sizeof(Operand), panel, c + n * M + p * kPanelHalf,
              first > begin);
        }
      }
    }
    return c;
  }

 private:
  static void multiply_block(
      const char* const* row, int64_t rows, int64_t first, int64_t count, const Columns<S>& b,
      Operand* panel, C* c) {
    for (int64_t p = 0; p * kPanelHalf < kHalf; ++p) {
      if (b.count[0] <= p * kPanelHalf && b.count[1] <= p * kPanelHalf) continue;
      pack_panel(b, p, first, count, panel);
      tiles(
          rows, steps_of(count), kPairs && count % 2, row, sizeof(Operand), panel,
          c + p * kPanelHalf, first > 0);
    }
  }
};

}  // namespace
}  // namespace moe_ext::kernels
