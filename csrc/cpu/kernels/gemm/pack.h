// Packing: a block of B, or of A's transpose, as a tile reads it: [steps][pitch] operands.
#pragma once

#include "cpu/kernels/gemm/formats/dense.h"
#include "cpu/kernels/simd/shuffle.h"

namespace moe_ext::cpu::kernels {
namespace {

// F: the format of what is packed.
template <class F>
struct Pack : F::Operands {
  using O = typename F::Operands;
  using S = typename F::Element;
  using Columns = typename F::Columns;
  using O::kLanes;
  using O::kPairs;
  using O::kPanelN;
  using O::kPanelSplitN;
  using O::kTermsPerStep;
  using O::steps_of;
  using typename O::Operand;
  using typename O::OperandReg;
  using typename O::Reg;

  // `width` (a multiple of kLanes) columns, of which `count` exist, from rows of terms.
  static void transposed(
      const S* data, int64_t n_stride, int64_t count, int64_t width, int64_t terms, Operand* out,
      int64_t pitch) {
    constexpr int64_t kTerms = kLanes * kTermsPerStep;
    for (int64_t n = 0; n < width; n += kLanes, data += kLanes * n_stride, out += kLanes) {
      int64_t k = 0;
      if (n + kLanes <= count) {
        for (; k + kTerms <= terms; k += kTerms) {
          OperandReg square[kLanes];
#pragma GCC unroll 16
          for (int i = 0; i < kLanes; ++i)
            square[i] = F::load_terms(data + i * n_stride + k, kTerms);
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
          square[i] =
              n + i < count ? F::load_terms(data + i * n_stride + k, terms - k) : OperandReg{};
        }
        transpose(square);
        for (int i = 0; i < smaller(steps_of(terms - k), kLanes); ++i) {
          __builtin_memcpy(out + (k / kTermsPerStep + i) * pitch, &square[i], sizeof(Reg));
        }
      }
    }
  }

  // The same from rows: term k is row k, or row k_index[k]. The vectors of columns of a
  // step lie vec_pitch operands apart.
  static void rows(
      const S* data, int64_t k_stride, const int32_t* k_index, int64_t count, int64_t width,
      int64_t terms, Operand* out, int64_t pitch, int64_t vec_pitch) {
    constexpr int64_t kFetch = 8;  // rows
    const auto row_of = [&](int64_t k) { return data + (k_index ? k_index[k] : k) * k_stride; };
    for (int64_t k = 0; k < terms; k += kTermsPerStep) {
      const S* first = row_of(k);
      const S* second = kPairs && k + 1 < terms ? row_of(k + 1) : nullptr;
      if (k + kFetch + kTermsPerStep <= terms) {
        for (int i = 0; i < kTermsPerStep; ++i) {
          const char* line = reinterpret_cast<const char*>(row_of(k + kFetch + i));
          for (int64_t byte = 0; byte < count * static_cast<int64_t>(sizeof(S)); byte += 64) {
            __builtin_prefetch(line + byte);
          }
        }
      }
      Operand* to = out;
      for (int64_t n = 0; n < width; n += kLanes, to += vec_pitch) {
        const OperandReg packed =
            F::load_columns(first + n, second ? second + n : nullptr, count - n);
        __builtin_memcpy(to, &packed, sizeof(packed));
      }
      out += pitch;
    }
  }

  // Panel `index` of b: its columns of both splits.
  static void panel(
      const Columns& b, int64_t index, int64_t first_term, int64_t terms, Operand* out) {
    const int64_t n = index * kPanelSplitN;
    for (int split = 0; split < 2; ++split) {
      const int64_t count = smaller(b.count[split] - n, kPanelSplitN);
      Operand* to = out + split * kPanelSplitN;
      if (b.k_stride == 1 && !b.k_index) {
        transposed(
            b.data[split] + n * b.n_stride + first_term, b.n_stride, count, kPanelSplitN, terms, to,
            kPanelN);
      } else if (b.k_index) {
        rows(
            b.data[split] + n, b.k_stride, b.k_index + first_term, count, kPanelSplitN, terms, to,
            kPanelN, kLanes);
      } else {
        rows(
            b.data[split] + n + first_term * b.k_stride, b.k_stride, nullptr, count, kPanelSplitN,
            terms, to, kPanelN, kLanes);
      }
    }
  }

  // Panels that hold any of b's columns.
  static int64_t panels_of(const Columns& b) {
    return (larger(b.count[0], b.count[1]) + kPanelSplitN - 1) / kPanelSplitN;
  }
};

}  // namespace
}  // namespace moe_ext::cpu::kernels
