// Packed weights serve evaluation: what would need a gradient is told so.
#include "autograd/function.h"

namespace moe_ext::autograd {
namespace {

void without_backward(
    const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto arguments = torch::jit::last(stack, schema.arguments().size());
  for (size_t i = 0; c10::GradMode::is_enabled() && i < arguments.size(); ++i) {
    TORCH_CHECK(
        !arguments[i].isTensor() || !arguments[i].toTensor().requires_grad(),
        "_moe_ffn_packed: ", schema.arguments()[i].name(),
        " must not require grad, as packed weights have no backward, got one that does: run it "
        "under torch.no_grad(), or call moe_ext.unpack_(module) first");
  }
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  op.redispatchBoxed(keys & c10::after_ADInplaceOrView_keyset, stack);
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, Autograd, m) {
  m.impl("_moe_ffn_packed", torch::CppFunction::makeFromBoxedFunction<&without_backward>());
}

}  // namespace moe_ext::autograd
