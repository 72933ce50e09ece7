// What the autograd files share. They run on fake tensors with symbolic shapes too, so they never
// read a size: what backward needs is carried by saved tensors.
#pragma once

#include <ATen/FuncTorchTLS.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <initializer_list>
#include <memory>
#include <string>
#include <type_traits>

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

// The first N saved tensors, to be named by a structured binding.
template <size_t N>
std::array<Tensor, N> named(const variable_list& saved) {
  std::array<Tensor, N> tensors;
  std::copy_n(saved.begin(), N, tensors.begin());
  return tensors;
}

struct Argument {
  const char* name;
  const Tensor& tensor;
};

// None in place of a tensor arrives as an undefined one, on which torch's Function fails.
inline void check_defined(const char* op, std::initializer_list<Argument> arguments) {
  for (const Argument& argument : arguments) {
    TORCH_CHECK_TYPE(
        argument.tensor.defined(), op, ": ", argument.name, " must be a tensor, got None");
  }
}

template <class T>
bool requires_grad(const T&) {
  return false;
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

template <class T>
bool has_tangent(const T&) {
  return false;
}
inline bool has_tangent(const Tensor& tensor) {
  return tensor.defined() && tensor._fw_grad(/*level=*/0).defined();
}
inline bool has_tangent(const OptionalTensor& tensor) { return tensor && has_tangent(*tensor); }

// F::apply(arguments), or, where no derivative can be asked for, F::forward without a context: the
// node of a graph, which would be thrown away, takes longer to make than a small operator to run.
template <class F, class... Args>
auto apply(const Args&... arguments) {
  if (will_backward(arguments...) || (has_tangent(arguments) || ...)) {
    return F::apply(arguments...);
  }
  if (const auto& functorch = at::functorch::functorchTLSAccessor()) {
    functorch->checkSupportsCppAutogradFunction();
  }
  return F::forward(nullptr, arguments...);
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

// The history of gradients under create_graph: whoever differentiates them arrives here.
class SecondDerivative : public torch::autograd::Node {
 public:
  SecondDerivative(const char* op, torch::autograd::edge_list&& inputs)
      : Node(std::move(inputs)), op_(op) {}

  variable_list apply(variable_list&&) override {
    TORCH_CHECK_NOT_IMPLEMENTED(
        false, op_,
        ": second derivatives are not supported; moe_ext.reference has the same "
        "operators in plain PyTorch, which has them");
  }

 private:
  const char* op_;
};

// Nodes are held by std::shared_ptr in torch 2.11, by c10::intrusive_ptr in 2.13.
using NodePtr = decltype(torch::autograd::Edge::function);

template <class T, class... Args>
NodePtr make_node(Args&&... args) {
  if constexpr (std::is_same_v<NodePtr, std::shared_ptr<torch::autograd::Node>>) {
    return std::make_shared<T>(std::forward<Args>(args)...);
  } else {
    return c10::make_intrusive<T>(std::forward<Args>(args)...);
  }
}

// The gradients as a function, which can't be differentiated, of the gradients `arrived` and of
// what was `saved`. They stay connected with those, so that every way of asking ends in the error:
// gradients with a history of their own would be silent zeros to autograd.grad.
inline variable_list once_differentiable(
    const char* op, variable_list grads, const variable_list& arrived, const variable_list& saved) {
  // Never without grad mode.
  if (!torch::autograd::compute_requires_grad(arrived, saved)) return grads;
  const NodePtr node =
      make_node<SecondDerivative>(op, torch::autograd::collect_next_edges(arrived, saved));
  for (Tensor& grad : grads) {
    if (!grad.defined()) continue;
    grad = grad.detach();
    torch::autograd::set_history(grad, node);
  }
  return grads;
}

}  // namespace moe_ext::autograd
