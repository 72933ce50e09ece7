// Under autocast the operands of the experts' products are cast; the router's mathematics keeps
// its fp32, so its operators have no kernel here and fall through.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <string_view>

#include "ops/checks.h"

namespace moe_ext::autocast {
namespace {

// The arguments that are cast. The others keep their dtype: routing, and weights of rows, which are
// multiplied in the dtype of the sums. Packed weights keep theirs too: the contract says if that is
// another.
bool is_operand(std::string_view argument) {
  constexpr std::array<std::string_view, 8> kOperands{
      "tokens", "rows", "weight", "bias", "gate_up_proj", "down_proj", "gate_up_bias", "down_bias"};
  return std::find(kOperands.begin(), kOperands.end(), argument) != kOperands.end();
}

// Casts the operands to the autocast dtype of the first one's device; fp64 and absent ones stay as
// they are. A cast reads, so it checks that there is memory to read.
void cast_operands(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const c10::FunctionSchema& schema = op.schema();
  const std::string name = schema.name().substr(schema.name().find("::") + 2);
  const auto arguments = torch::jit::last(stack, schema.arguments().size());
  const at::Tensor& first = arguments[0].toTensor();
  check_defined(name.c_str(), schema.arguments()[0].name().c_str(), first);
  const c10::DeviceType device = first.device().type();
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(device);
  for (size_t i = 0; i < arguments.size(); ++i) {
    const std::string& argument = schema.arguments()[i].name();
    c10::IValue& value = (*stack)[stack->size() - arguments.size() + i];
    if (!value.isTensor() || !is_operand(argument)) continue;
    check_defined(name.c_str(), argument.c_str(), value.toTensor());
    check_memory(name.c_str(), argument.c_str(), value.toTensor());
    value = at::autocast::cached_cast(dtype, value.toTensor(), device);
  }
  op.callBoxed(stack);
}

void register_casts(torch::Library& m) {
  for (const char* name :
       {"_grouped_linear", "expert_ffn", "moe_ffn", "_moe_ffn_pairs", "_moe_ffn_packed"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&cast_operands>());
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, AutocastCPU, m) { register_casts(m); }
TORCH_LIBRARY_IMPL(moe_ext, AutocastCUDA, m) { register_casts(m); }

}  // namespace moe_ext::autocast
