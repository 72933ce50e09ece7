#include "python/call.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <optional>
#include <string>

namespace moe_ext::python {
namespace {

// The value as one of a schema's type; nothing if it is not exactly that.
std::optional<c10::IValue> read(const c10::TypePtr& type, PyObject* object) {
  switch (type->kind()) {
    case c10::TypeKind::TensorType:
      // No subclass: it may have __torch_function__.
      if (THPVariable_CheckExact(object)) return c10::IValue(THPVariable_Unpack(object));
      break;
    case c10::TypeKind::OptionalType:
      if (object == Py_None) return c10::IValue();
      return read(type->castRaw<c10::OptionalType>()->getElementType(), object);
    case c10::TypeKind::BoolType:
      if (PyBool_Check(object)) return c10::IValue(object == Py_True);
      break;
    case c10::TypeKind::IntType:
      if (PyLong_CheckExact(object)) {
        int overflow = 0;
        const int64_t value = PyLong_AsLongLongAndOverflow(object, &overflow);
        if (overflow == 0) return c10::IValue(value);
      }
      break;
    case c10::TypeKind::FloatType:
      if (PyFloat_CheckExact(object)) return c10::IValue(PyFloat_AS_DOUBLE(object));
      break;
    case c10::TypeKind::StringType:
      if (PyUnicode_CheckExact(object)) {
        Py_ssize_t size = 0;
        const char* text = PyUnicode_AsUTF8AndSize(object, &size);
        if (text) return c10::IValue(std::string(text, size));
        PyErr_Clear();  // a lone surrogate
      }
      break;
    default:
      break;
  }
  return std::nullopt;
}

PyObject* wrap(c10::IValue&& value) { return THPVariable_Wrap(std::move(value).toTensor()); }

// What an operator returns: tensors, or nothing.
PyObject* wrap_all(torch::jit::Stack&& stack) {
  if (stack.empty()) Py_RETURN_NONE;
  if (stack.size() == 1) return wrap(std::move(stack[0]));
  PyObject* tuple = PyTuple_New(static_cast<Py_ssize_t>(stack.size()));
  if (!tuple) return nullptr;
  for (size_t i = 0; i < stack.size(); ++i) {
    PyTuple_SET_ITEM(tuple, static_cast<Py_ssize_t>(i), wrap(std::move(stack[i])));
  }
  return tuple;
}

PyObject* call(PyObject* capsule, PyObject* const* objects, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  const auto& op = *static_cast<c10::OperatorHandle*>(PyCapsule_GetPointer(capsule, nullptr));
  const std::vector<c10::Argument>& arguments = op.schema().arguments();
  if (static_cast<size_t>(count) != arguments.size() || at::impl::torch_function_mode_enabled()) {
    Py_RETURN_NOTIMPLEMENTED;
  }
  torch::jit::Stack stack;
  stack.reserve(arguments.size());
  for (Py_ssize_t i = 0; i < count; ++i) {
    std::optional<c10::IValue> value = read(arguments[i].type(), objects[i]);
    if (!value) Py_RETURN_NOTIMPLEMENTED;
    stack.push_back(*std::move(value));
  }
  {
    const pybind11::gil_scoped_release no_gil;
    op.callBoxed(stack);
  }
  return wrap_all(std::move(stack));
  END_HANDLE_TH_ERRORS
}

PyMethodDef kCall{
    "call", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&call)), METH_FASTCALL,
    nullptr};

}  // namespace

PyObject* make_call(const char* name) {
  const std::string full = std::string("moe_ext::") + name;
  // Lives as long as the process, as the operator does.
  auto* op =
      new c10::OperatorHandle(c10::Dispatcher::singleton().findSchemaOrThrow(full.c_str(), ""));
  PyObject* capsule = PyCapsule_New(op, nullptr, nullptr);
  if (!capsule) return nullptr;
  PyObject* function = PyCFunction_New(&kCall, capsule);
  Py_DECREF(capsule);
  return function;
}

}  // namespace moe_ext::python
