// fuse_grad_accumulation: backward adds the gradient of a weight to where it is kept, and autograd
// gets none. Here: where that is, and when autograd must get it.
#pragma once

#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/graph_task.h>

#include "autograd/function.h"

namespace moe_ext::autograd {

// A gradient that an optimizer keeps itself, by Megatron's convention: Python's attribute main_grad
// of a parameter, and grad_added_to_main_grad, by which its trainer's hooks see that there is
// nothing left for them to add. Set by python/main_grad.cpp: autograd knows no Python.
struct MainGrad {
  // Undefined if the parameter has none; an error if it does not fit. `name`: for messages.
  Tensor (*find)(const char* op, const char* name, const Tensor& parameter) =
      [](const char*, const char*, const Tensor&) { return Tensor(); };
  // Whether the parameter has the mark.
  bool (*has_mark)(const Tensor& parameter) = [](const Tensor&) { return false; };
  void (*mark)(const Tensor& parameter) = [](const Tensor&) {};
};
inline MainGrad main_grad;

// What the gradient of a parameter is added to; nothing if `sum` is undefined.
struct GradTarget {
  Tensor sum;
  // Of main_grad: what must be marked, if anything.
  Tensor marked = {};
  // Autograd gets zeros, so that the hooks run that look at the mark.
  bool has_hooks = false;

  // What autograd gets instead of the gradient, which was added.
  Tensor finish() const {
    torch::autograd::impl::bump_version(sum);
    if (marked.defined()) main_grad.mark(marked);
    return has_hooks ? at::zeros_like(marked) : Tensor();
  }
};

inline bool is_subclass(const Tensor& tensor) {
  return tensor.unsafeGetTensorImpl()->is_python_dispatch();
}

// The layouts [E, N, K] that the operator adds to.
inline bool is_contiguous_or_transposed(const Tensor& grad) {
  return grad.is_contiguous() || grad.transpose(1, 2).is_contiguous();
}

// Whether autograd would add to grad in place, and the kernels can. Of the CPU only: elsewhere
// nothing is gained, and autograd knows the stream that grad is used on.
inline bool takes_gradient(const Tensor& grad, const Tensor& parameter) {
  return grad.defined() && grad.is_cpu() && grad.layout() == at::kStrided && !is_subclass(grad) &&
         !grad.is_inference() && !grad.requires_grad() &&
         grad.scalar_type() == parameter.scalar_type() && grad.is_same_size(parameter) &&
         is_contiguous_or_transposed(grad);
}

// The target of the gradient that goes along `edge`; `name` of the weight, for messages.
inline GradTarget find_target(const char* op, const char* name, const torch::autograd::Edge& edge) {
  auto* leaf = dynamic_cast<torch::autograd::AccumulateGrad*>(edge.function.get());
  if (!leaf || is_subclass(leaf->variable)) return {};
  const Tensor& parameter = leaf->variable;
  GradTarget target{main_grad.find(op, name, parameter)};
  const bool is_main = target.sum.defined();
  if (is_main && main_grad.has_mark(parameter)) target.marked = parameter;
  const bool needs_gradient = !leaf->pre_hooks().empty() || !leaf->tensor_pre_hooks().empty() ||
                              leaf->tensor_post_acc_grad_hooks() != nullptr;
  target.has_hooks = !leaf->post_hooks().empty();
  if (needs_gradient || (target.has_hooks && !target.marked.defined())) {
    TORCH_WARN_ONCE(
        op, ": fuse_grad_accumulation has no effect on ", name,
        ": it has hooks that need its gradient (DistributedDataParallel's, or register_hook's), so "
        "autograd accumulates it; remove the hooks or turn the option off");
    return {};
  }
  if (!is_main) {
    if (!takes_gradient(parameter.grad(), parameter)) return {};
    target.sum = parameter.grad();
  }
  return target;
}

// The edge of input `index` of the node of Fn whose backward runs with ctx, or null where autograd
// must get all gradients: under create_graph, where some were asked for by autograd.grad or
// backward(inputs=), and where no engine runs the node.
template <class Fn>
const torch::autograd::Edge* accumulating_edge(const AutogradContext* ctx, size_t index) {
  const auto* asked = torch::autograd::get_current_graph_task_exec_info();
  if (at::GradMode::is_enabled() || !asked || !asked->empty()) return nullptr;
  const auto node = torch::autograd::get_current_node();
  const auto* own = dynamic_cast<torch::autograd::CppNode<Fn>*>(node.get());
  // `node` is held by the engine while it runs.
  return own && &own->ctx_ == ctx ? &own->next_edge(index) : nullptr;
}

}  // namespace moe_ext::autograd
