// _add_once: total += value, once for each forward.
//
// Activation checkpointing runs a forward again within backward; what was counted in it then is
// counted already. An operator asks at run time, so that it holds for compiled code too, however
// compiling and checkpointing are nested.
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

namespace moe_ext::autograd {
namespace {

void add_once(at::Tensor& total, const at::Tensor& value) {
  if (torch::autograd::get_current_graph_task_id() == -1) total.add_(value);
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, CompositeExplicitAutograd, m) { m.impl("_add_once", add_once); }

}  // namespace moe_ext::autograd
