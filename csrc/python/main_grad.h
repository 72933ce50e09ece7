// A parameter's main_grad: what only Python knows of it.
#pragma once

namespace moe_ext::python {

// Tells autograd how to find a main_grad and to mark that it was added to.
void set_main_grad();

}  // namespace moe_ext::python
