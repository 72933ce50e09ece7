#include "ops/moe_ffn_packed.h"

#include <ATen/ops/constant_pad_nd.h>

#include "cpu/experts.h"
#include "cpu/register.h"

namespace moe_ext::cpu {
namespace {

// How packed weights split the columns of an expert.
struct Splits {
  int64_t count, width;
  explicit Splits(bool gated) : count(gated ? 2 : 1), width(kPackedColumns / count) {}
};

// operators

at::Tensor moe_ffn_packed(
    const at::Tensor& tokens, const at::Tensor& weights, const at::Tensor& ids,
    const std::optional<at::Tensor>& pair_tokens_, const at::Tensor& gate_up_packed,
    const at::Tensor& down_packed, const std::optional<at::Tensor>& gate_up_bias,
    const std::optional<at::Tensor>& down_bias, int64_t intermediate_size,
    c10::string_view activation, bool gated) {
  constexpr const char* op = "_moe_ffn_packed";
  const PackedExpertWeights experts{
      gate_up_packed, down_packed, gate_up_bias, down_bias, intermediate_size};
  const Activation parsed =
      check_moe_ffn_packed(tokens, weights, ids, pair_tokens_, experts, activation, gated);
  const RoutedRows rows = plan_rows(op, tokens, weights, ids, pair_tokens_, gate_up_packed.size(0));
  const at::Tensor out = empty_like_contiguous(tokens);
  packed_experts_forward(tokens, rows, experts, parsed, gated, out);
  return out;
}

at::Tensor pack_weights(const at::Tensor& weight, bool gated) {
  check_pack_weights(weight, gated);
  const int64_t E = weight.size(0), N = weight.size(1), K = weight.size(2);
  const PackedSizes sizes(E, N, K, gated, weight.scalar_type());
  const int64_t blocks = sizes.blocks.expect_int(), steps = sizes.steps.expect_int();
  const int64_t terms = sizes.step_terms;
  const Splits splits(gated);
  const int64_t n = N / splits.count;
  const at::Tensor packed =
      empty_result({E, blocks, steps, kPackedColumns, terms}, weight.options());
  for (int64_t e = 0; e < E; ++e) {
    at::Tensor columns = weight.select(0, e).reshape({splits.count, n, K});
    const int64_t more_n = blocks * splits.width - n, more_k = steps * terms - K;
    if (more_n || more_k) columns = at::constant_pad_nd(columns, {0, more_k, 0, more_n}, 0);
    columns = columns.reshape({splits.count, blocks, splits.width, steps, terms});
    packed.select(0, e)
        .view({blocks, steps, splits.count, splits.width, terms})
        .copy_(columns.permute({1, 3, 0, 2, 4}));
  }
  return packed;
}

at::Tensor unpack_weights(const at::Tensor& packed_, int64_t N, int64_t K, bool gated) {
  const PackedSizes sizes = check_unpack_weights(packed_, N, K, gated);
  const at::Tensor packed = packed_.contiguous();
  const int64_t E = packed.size(0), blocks = packed.size(1), steps = packed.size(2);
  const int64_t terms = sizes.step_terms;
  const Splits splits(gated);
  const int64_t n = N / splits.count;
  const at::Tensor weight = empty_result({E, N, K}, packed.options());
  for (int64_t e = 0; e < E; ++e) {
    const at::Tensor columns = packed.select(0, e)
                                   .view({blocks, steps, splits.count, splits.width, terms})
                                   .permute({2, 0, 3, 1, 4})
                                   .reshape({splits.count, blocks * splits.width, steps * terms});
    weight.select(0, e).view({splits.count, n, K}).copy_(columns.narrow(1, 0, n).narrow(2, 0, K));
  }
  return weight;
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, CPU, m) {
  impl<moe_ffn_packed>(m, "_moe_ffn_packed");
  impl<pack_weights>(m, "_pack_weights");
  impl<unpack_weights>(m, "_unpack_weights");
}

}  // namespace moe_ext::cpu
