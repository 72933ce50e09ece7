// _moe_ffn_packed: moe_ffn, without backward, on packed weights: in the order in which the products
// read them (cpu/kernels/gemm/formats/packed.h), in blocks of 64 columns, zeros where the matrix
// ends. P terms are a step: 2 of bfloat16, else 1.
//
//   weight          [E, N, K]                        float
//   packed          [E, ceil(N/64), ceil(K/P), 64, P]  weight's dtype; gated: N is 2I, and a block
//                                                      32 columns of gate and the same 32 of up, so
//                                                      ceil(I/32) blocks
//   gate_up_packed  of gate_up_proj [E, 2I, H], or of up_proj [E, I, H] if not gated
//   down_packed     of down_proj [E, H, I]
//   all others      as for moe_ffn; with pair_tokens [P] as for _moe_ffn_pairs
#pragma once

#include "ops/moe_ffn.h"

namespace moe_ext {

constexpr int64_t kPackedColumns = 64;

inline int64_t packed_step_terms(at::ScalarType dtype) { return dtype == at::kBFloat16 ? 2 : 1; }

// The sizes of a packed weight [E, N, K]; gated: of which N is 2I.
struct PackedSizes {
  c10::SymInt E, blocks, steps;
  int64_t step_terms;

  PackedSizes(
      const c10::SymInt& E, const c10::SymInt& N, const c10::SymInt& K, bool gated,
      at::ScalarType dtype)
      : E(E),
        blocks((N + kPackedColumns - 1) / kPackedColumns),
        steps(K),
        step_terms(packed_step_terms(dtype)) {
    if (gated) blocks = (N / 2 + kPackedColumns / 2 - 1) / (kPackedColumns / 2);
    steps = (K + step_terms - 1) / step_terms;
  }
  std::vector<c10::SymInt> sizes() const {
    return {E, blocks, steps, c10::SymInt(kPackedColumns), c10::SymInt(step_terms)};
  }
};

struct PackedExpertWeights {
  at::Tensor gate_up;
  at::Tensor down;
  std::optional<at::Tensor> gate_up_bias;
  std::optional<at::Tensor> down_bias;
  c10::SymInt intermediate_size;
};

inline Activation check_moe_ffn_packed(
    const at::Tensor& tokens, const at::Tensor& weights, const at::Tensor& ids,
    const std::optional<at::Tensor>& pair_tokens, const PackedExpertWeights& experts,
    c10::string_view activation, bool gated) {
  constexpr const char* op = "_moe_ffn_packed";
  check_assignment(op, tokens, weights, ids, pair_tokens);
  const c10::SymInt H = tokens.sym_size(1), I = experts.intermediate_size;
  check_positive(op, "tokens", "H", H);
  check_positive(op, "intermediate_size", "I", I);
  TORCH_CHECK(
      experts.gate_up.dim() == 5, op, ": gate_up_packed must be [E, blocks, steps, 64, P], got ",
      experts.gate_up.sym_sizes());
  const c10::SymInt E = experts.gate_up.sym_size(0);
  check_num_experts(op, "gate_up_packed's E", E);
  const at::ScalarType dtype = experts.gate_up.scalar_type();
  const c10::SymInt width = gated ? 2 * I : I;
  const PackedSizes up(E, width, H, gated, dtype), down(E, H, I, false, dtype);
  const auto check = [&](const char* name, const at::Tensor& packed, const PackedSizes& want) {
    check_operand(
        op, name, packed, "tokens", tokens,
        {{"E", want.E},
         {"blocks", want.blocks},
         {"steps", want.steps},
         {"columns", kPackedColumns},
         {"P", want.step_terms}});
  };
  check("gate_up_packed", experts.gate_up, up);
  check("down_packed", experts.down, down);
  check_expert_biases(
      op, "tokens", tokens, experts.gate_up_bias, experts.down_bias, E, width, gated);
  return parse_activation(op, activation, gated);
}

inline void check_pack_weights(const at::Tensor& weight, bool gated) {
  constexpr const char* op = "_pack_weights";
  check_float(op, "weight", weight);
  check_shape(op, "weight", weight, {{"E"}, {"N"}, {"K"}});
  check_memory(op, "weight", weight);
  check_positive(op, "weight", "E", weight.sym_size(0));
  check_positive(op, "weight", "N", weight.sym_size(1));
  check_positive(op, "weight", "K", weight.sym_size(2));
  if (gated) {
    TORCH_SYM_CHECK(
        (weight.sym_size(1) % 2).sym_eq(0), op, ": weight must be [E, N, K] with an even N, got ",
        weight.sym_sizes());
  }
}

// The sizes of `packed`, which is checked.
inline PackedSizes check_unpack_weights(
    const at::Tensor& packed, const c10::SymInt& N, const c10::SymInt& K, bool gated) {
  constexpr const char* op = "_unpack_weights";
  check_float(op, "packed", packed);
  check_positive(op, "N", "N", N);
  check_positive(op, "K", "K", K);
  TORCH_CHECK(
      packed.dim() == 5, op, ": packed must be [E, blocks, steps, 64, P], got ",
      packed.sym_sizes());
  const PackedSizes want(packed.sym_size(0), N, K, gated, packed.scalar_type());
  check_shape(
      op, "packed", packed,
      {{"E"},
       {"blocks", want.blocks},
       {"steps", want.steps},
       {"columns", kPackedColumns},
       {"P", want.step_terms}});
  check_memory(op, "packed", packed);
  return want;
}

}  // namespace moe_ext
