// torch.vmap over an operator: an error that says what to do instead, where torch's own does not.
// Nothing is lost by it: an operator's batch are its tokens. (The other transforms of torch.func
// are refused by torch.)
#include <torch/library.h>

namespace {

void no_vmap(const c10::OperatorHandle& op, torch::jit::Stack*) {
  // Without the private operators' underscore, which a user of a layer never wrote.
  const std::string& name = op.operator_name().name;
  TORCH_CHECK_NOT_IMPLEMENTED(
      false, name.substr(name.find_first_not_of(":_", name.find(':'))),
      ": torch.vmap is not supported; give it the whole batch as tokens (MoE takes [..., H])");
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, FuncTorchBatched, m) {
  for (const char* name :
       {"_router_logits", "topk_router",        "_router_weights", "load_balancing_loss",
        "router_z_loss",  "_tokens_per_expert", "_router_entropy", "_apply_capacity",
        "_round_tokens",  "_expert_choice",     "_pair_weights",   "permute",
        "unpermute",      "_grouped_linear",    "expert_ffn",      "moe_ffn",
        "_moe_ffn_pairs", "_moe_ffn_packed",    "_pack_weights",   "_unpack_weights"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&no_vmap>());
  }
}
