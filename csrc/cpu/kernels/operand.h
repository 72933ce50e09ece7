// What a matrix product multiplies: operands, and the columns of B that a piece takes.
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
constexpr int64_t kMaxWideTerms = 256;  // with several pieces side by side
constexpr int64_t kMaxGradTerms = 256;  // of a packed block of tokens
constexpr int64_t kHalf = kPieceCols / 2;
constexpr int64_t kMaxDotRows = 32;
constexpr int64_t kMaxDotCols = 16;

// The B operand of a piece: its columns are two runs (gate and up, or simply neighbours).
template <class S>
struct Columns {
  const S* data[2];
  int64_t count[2];  // 0 to kHalf
  int64_t n_stride, k_stride;
  const int32_t* k_index;  // gathers the terms; needs n_stride == 1
  int64_t size() const { return count[0] + count[1]; }
};

// Neighbours, of which `left` exist.
template <class S>
MOE_INLINE Columns<S> neighbours(
    const S* data, int64_t left, int64_t n_stride, int64_t k_stride,
    const int32_t* k_index = nullptr) {
  return {
      {data, data + kHalf * n_stride},
      {smaller(left, kHalf), larger(smaller(left - kHalf, kHalf), 0)},
      n_stride,
      k_stride,
      k_index};
}

}  // namespace
}  // namespace moe_ext::kernels
