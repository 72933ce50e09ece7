// Under autocast the operands of the experts' products are cast; the router's mathematics keeps
// its fp32, so its operators have no kernel here and fall through.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "ops/checks.h"

namespace moe_ext::autocast {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<at::Tensor>;

template <class Sig>
c10::TypedOperatorHandle<Sig> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Sig>();
}

// Casts an operator's arguments to the autocast dtype of `like`'s device; fp64 and undefined
// tensors stay as they are. A cast reads, so it checks that there is memory to read.
struct Cast {
  const char* op;
  c10::DeviceType device;
  at::ScalarType dtype;

  Cast(const char* op, const char* argument, const Tensor& like) : op(op) {
    check_defined(op, argument, like);
    device = like.device().type();
    dtype = at::autocast::get_autocast_dtype(device);
  }

  Tensor operator()(const char* argument, const Tensor& tensor) const {
    check_defined(op, argument, tensor);
    check_memory(op, argument, tensor);
    return at::autocast::cached_cast(dtype, tensor, device);
  }
  OptionalTensor operator()(const char* argument, const OptionalTensor& tensor) const {
    return tensor ? OptionalTensor((*this)(argument, *tensor)) : std::nullopt;
  }
};

Tensor grouped_linear(
    const Tensor& rows, const Tensor& expert_offsets, const Tensor& weight,
    const OptionalTensor& bias) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  static const auto op = find_op<decltype(grouped_linear)>("moe_ext::_grouped_linear");
  const Cast cast("_grouped_linear", "rows", rows);
  return op.call(cast("rows", rows), expert_offsets, cast("weight", weight), cast("bias", bias));
}

Tensor expert_ffn(
    const Tensor& rows, const Tensor& expert_offsets, const Tensor& gate_up_proj,
    const Tensor& down_proj, const OptionalTensor& gate_up_bias, const OptionalTensor& down_bias,
    const OptionalTensor& row_weights, c10::string_view activation, bool gated,
    c10::string_view recompute) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  static const auto op = find_op<decltype(expert_ffn)>("moe_ext::expert_ffn");
  const Cast cast("expert_ffn", "rows", rows);
  return op.call(
      cast("rows", rows), expert_offsets, cast("gate_up_proj", gate_up_proj),
      cast("down_proj", down_proj), cast("gate_up_bias", gate_up_bias),
      cast("down_bias", down_bias), row_weights, activation, gated, recompute);
}

Tensor moe_ffn(
    const Tensor& tokens, const Tensor& topk_weights, const Tensor& topk_ids,
    const Tensor& gate_up_proj, const Tensor& down_proj, const OptionalTensor& gate_up_bias,
    const OptionalTensor& down_bias, c10::string_view activation, bool gated,
    c10::string_view recompute) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  static const auto op = find_op<decltype(moe_ffn)>("moe_ext::moe_ffn");
  const Cast cast("moe_ffn", "tokens", tokens);
  return op.call(
      cast("tokens", tokens), topk_weights, topk_ids, cast("gate_up_proj", gate_up_proj),
      cast("down_proj", down_proj), cast("gate_up_bias", gate_up_bias),
      cast("down_bias", down_bias), activation, gated, recompute);
}

Tensor moe_ffn_pairs(
    const Tensor& tokens, const Tensor& pair_weights, const Tensor& pair_experts,
    const Tensor& pair_tokens, const Tensor& gate_up_proj, const Tensor& down_proj,
    const OptionalTensor& gate_up_bias, const OptionalTensor& down_bias,
    c10::string_view activation, bool gated, c10::string_view recompute) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  static const auto op = find_op<decltype(moe_ffn_pairs)>("moe_ext::_moe_ffn_pairs");
  const Cast cast("_moe_ffn_pairs", "tokens", tokens);
  return op.call(
      cast("tokens", tokens), pair_weights, pair_experts, pair_tokens,
      cast("gate_up_proj", gate_up_proj), cast("down_proj", down_proj),
      cast("gate_up_bias", gate_up_bias), cast("down_bias", down_bias), activation, gated,
      recompute);
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, AutocastCPU, m) {
  m.impl("_grouped_linear", grouped_linear);
  m.impl("expert_ffn", expert_ffn);
  m.impl("moe_ffn", moe_ffn);
  m.impl("_moe_ffn_pairs", moe_ffn_pairs);
}

TORCH_LIBRARY_IMPL(moe_ext, AutocastCUDA, m) {
  m.impl("_grouped_linear", grouped_linear);
  m.impl("expert_ffn", expert_ffn);
  m.impl("moe_ffn", moe_ffn);
  m.impl("_moe_ffn_pairs", moe_ffn_pairs);
}

}  // namespace moe_ext::autocast
