// What a multiply-add takes, by what the tokens are stored as: fp32 and fp64 as they are; bf16 as
// pairs of terms where the machine multiplies pairs; otherwise bf16 and fp16 widened to fp32
// (exactly) while packing.
#pragma once

#include "cpu/kernels/simd/convert.h"
#include "cpu/kernels/tuning.h"

namespace moe_ext::cpu::kernels {
namespace {

constexpr int kTileM = TileShape<MOE_VECTOR_BYTES>::kM;
constexpr int kTileVecs = TileShape<MOE_VECTOR_BYTES>::kVecs;

template <class S>
struct Multiplied {
  using Compute = float;
  using Operand = float;
  static constexpr bool kPairs = false;   // an operand holds two terms
  static constexpr bool kDirect = false;  // rows of A are operands as they lie
};
template <>
struct Multiplied<float> {
  using Compute = float;
  using Operand = float;
  static constexpr bool kPairs = false;
  static constexpr bool kDirect = true;
};
template <>
struct Multiplied<double> {
  using Compute = double;
  using Operand = double;
  static constexpr bool kPairs = false;
  static constexpr bool kDirect = true;
};
#if defined(MOE_AVX512_BF16)
template <>
struct Multiplied<bf16> {
  using Compute = float;
  using Operand = uint32_t;
  static constexpr bool kPairs = true;
  static constexpr bool kDirect = true;
};
#endif

// The operands of tokens that are stored as S.
template <class S>
struct Operands : Multiplied<S> {
  using typename Multiplied<S>::Operand;
  using Multiplied<S>::kPairs;
  using Multiplied<S>::kDirect;
  using C = typename Multiplied<S>::Compute;
  using V = Vec<C>;
  using Reg = typename V::Reg;
  typedef Operand OperandReg __attribute__((vector_size(MOE_VECTOR_BYTES)));
  static constexpr int kLanes = V::kLanes;
  static constexpr int kTermsPerStep = kPairs ? 2 : 1;
  // A panel: the columns of a tile, from each split half of them.
  static constexpr int kPanelN = kTileVecs * kLanes;
  static constexpr int kPanelSplitN = kPanelN / 2;

  static int64_t steps_of(int64_t terms) { return ceil_div(terms, kTermsPerStep); }

  static MOE_INLINE OperandReg broadcast(Operand x) { return x - OperandReg{}; }

  static MOE_INLINE Reg multiply_add(OperandReg a, OperandReg b, Reg c) {
#if defined(MOE_AVX512_BF16)
    if constexpr (kPairs) {
      return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(b), reinterpret_cast<__m512bh>(a));
    } else {
      return fused_multiply_add(a, b, c);
    }
#else
    return fused_multiply_add(a, b, c);
#endif
  }
};

}  // namespace
}  // namespace moe_ext::cpu::kernels
