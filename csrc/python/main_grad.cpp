#include "python/main_grad.h"

#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>

#include "autograd/grad_accumulation.h"

namespace moe_ext::python {
namespace {

constexpr const char* kMainGradMark = "grad_added_to_main_grad";

pybind11::object object_of(const at::Tensor& parameter) {
  return pybind11::reinterpret_steal<pybind11::object>(THPVariable_Wrap(parameter));
}

void check_main_grad(
    const char* op, const char* name, const at::Tensor& sum, const at::Tensor& parameter) {
  const auto dtype = parameter.scalar_type();
  const bool fits =
      (sum.scalar_type() == dtype || (sum.scalar_type() == at::kFloat && dtype != at::kDouble)) &&
      sum.sizes() == parameter.sizes() && sum.device() == parameter.device() &&
      sum.layout() == at::kStrided && !sum.requires_grad() &&
      moe_ext::autograd::is_contiguous_or_transposed(sum);
  TORCH_CHECK(
      fits, op, ": main_grad of ", name, " must be a contiguous ",
      dtype == at::kDouble || dtype == at::kFloat ? "" : "Float or ", dtype, " tensor ",
      parameter.sizes(), " on ", parameter.device(), " without requires_grad, got ",
      sum.scalar_type(), " ", sum.sizes(), " on ", sum.device(),
      sum.requires_grad() ? " with requires_grad" : "",
      sum.layout() == at::kStrided && sum.sizes() == parameter.sizes() &&
              !moe_ext::autograd::is_contiguous_or_transposed(sum)
          ? " that is not contiguous"
          : "");
}

at::Tensor find_main_grad(const char* op, const char* name, const at::Tensor& parameter) {
  const pybind11::gil_scoped_acquire gil;
  const pybind11::object found =
      pybind11::getattr(object_of(parameter), "main_grad", pybind11::none());
  if (found.is_none()) return {};
  TORCH_CHECK_TYPE(
      THPVariable_Check(found.ptr()), op, ": main_grad of ", name, " must be a tensor, got ",
      Py_TYPE(found.ptr())->tp_name);
  const at::Tensor& main_grad = THPVariable_Unpack(found.ptr());
  check_main_grad(op, name, main_grad, parameter);
  return main_grad;
}

bool has_main_grad_mark(const at::Tensor& parameter) {
  const pybind11::gil_scoped_acquire gil;
  return pybind11::hasattr(object_of(parameter), kMainGradMark);
}

void mark_main_grad(const at::Tensor& parameter) {
  const pybind11::gil_scoped_acquire gil;
  object_of(parameter).attr(kMainGradMark) = true;
}

}  // namespace

void set_main_grad() { autograd::main_grad = {find_main_grad, has_main_grad_mark, mark_main_grad}; }

}  // namespace moe_ext::python
