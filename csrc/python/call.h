// Calls of operators from Python.
#pragma once

#include <torch/csrc/python_headers.h>

namespace moe_ext::python {

// The operator moe_ext::name as a Python function of all its arguments, in the order of the schema
// and without names: torch.ops.moe_ext.name for plain arguments, at a third of the time for looking
// at them. It goes through the dispatcher too, so every feature of torch's below it holds.
// NotImplemented where an argument has __torch_function__, a mode has it, or a value is not exactly
// of the schema's type: torch.ops knows what to do, or what to say.
PyObject* make_call(const char* name);

}  // namespace moe_ext::python
