// Weights, and tokens, as they are: in the dtype of the tokens. Only the files of this folder know
// how a weight's memory is read; the rest of the product asks its format for
//   Columns<S>                   where the columns of a block of B lie
//   load_terms(p, terms)         operands of consecutive terms of a column
//   load_columns(rows, count)    operands of consecutive columns of one step
#pragma once

#include "cpu/kernels/gemm/operands.h"

namespace moe_ext::cpu::kernels {
namespace {

// The B operand of a block: its columns are two splits (gate and up, or simply neighbours).
template <class S>
struct Columns {
  const S* data[2];
  int64_t count[2];  // 0 to kSplitN
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
      {data, data + kSplitN * n_stride},
      {smaller(left, kSplitN), larger(smaller(left - kSplitN, kSplitN), 0)},
      n_stride,
      k_stride,
      k_index};
}

template <class S>
struct Dense {
  using Element = S;
  using Operands = kernels::Operands<S>;
  using Columns = kernels::Columns<S>;
  using V = typename Operands::V;
  using OperandReg = typename Operands::OperandReg;
  static constexpr bool kPairs = Operands::kPairs;
  static constexpr int kLanes = Operands::kLanes;

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

  // kLanes operands of consecutive columns, of which `count` exist, from the rows of a step's first
  // and, of pairs, second term (null: none).
  static MOE_INLINE OperandReg load_columns(const S* first, const S* second, int64_t count) {
    if constexpr (kPairs) {
      OperandReg pairs = widen(load_half(first, count));
      if (second) pairs |= widen(load_half(second, count)) << 16;
      return pairs;
    } else {
      return load<V>(first, count).v;
    }
  }

 private:
  static MOE_INLINE HalfReg load_half(const S* p, int64_t count) {
    if (count >= kLanes) return read_as<HalfReg>(p);
    S lane[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) lane[i] = p[i];
    return read_as<HalfReg>(lane);
  }
};

}  // namespace
}  // namespace moe_ext::cpu::kernels
