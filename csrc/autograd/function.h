// What the autograd files share. They run on fake tensors with symbolic shapes too, so they never
// read a size: what backward needs is carried by saved tensors.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/library.h>

#include <string>

namespace moe_ext::autograd {

using at::Tensor;
using OptionalTensor = std::optional<at::Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

template <class Sig>
c10::TypedOperatorHandle<Sig> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Sig>();
}

inline OptionalTensor as_optional(const Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

inline bool requires_grad(const Tensor& tensor) { return tensor.requires_grad(); }
inline bool requires_grad(const OptionalTensor& tensor) {
  return tensor && tensor->requires_grad();
}

// Whether backward can be asked for: nothing is saved otherwise.
template <class... Tensors>
bool will_backward(const Tensors&... tensors) {
  return at::GradMode::is_enabled() && (requires_grad(tensors) || ...);
}

// needs_input_grad counts the tensors that are defined, so an absent optional shifts the index:
// ask for the inputs in order, and say which are there.
class NeedsGrad {
 public:
  explicit NeedsGrad(const AutogradContext* ctx) : ctx_(ctx) {}
  bool next(bool present = true) { return present && ctx_->needs_input_grad(index_++); }

 private:
  const AutogradContext* ctx_;
  size_t index_ = 0;
};

// Gradients are no functions to be differentiated again: under create_graph whoever tries gets an
// error instead of a silent zero.
inline variable_list once_differentiable(const char* op, variable_list grads) {
  if (!at::GradMode::is_enabled()) return grads;
  for (Tensor& grad : grads) {
    if (grad.defined()) grad = grad.detach().requires_grad_(true);
  }
  const auto error = std::make_shared<torch::autograd::DelayedError>(
      std::string(op) + ": second derivatives are not supported",
      static_cast<int64_t>(grads.size()));
  return error->apply(std::move(grads));
}

}  // namespace moe_ext::autograd
