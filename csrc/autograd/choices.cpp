// Operators that choose, count and pack: their results have no derivative, whatever they are given.
#include "autograd/function.h"

namespace moe_ext::autograd {
namespace {

void without_gradient(
    const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  op.redispatchBoxed(keys & c10::after_ADInplaceOrView_keyset, stack);
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, Autograd, m) {
  for (const char* name :
       {"_tokens_per_expert", "_router_entropy", "_apply_capacity", "_round_tokens",
        "_expert_choice", "_pack_weights", "_unpack_weights"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&without_gradient>());
  }
}

}  // namespace moe_ext::autograd
