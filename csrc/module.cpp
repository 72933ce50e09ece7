// moe_ext._C: importing it runs the operators' registrations. It exposes facts of the build and of
// the machine and never a tensor; tensors go through the dispatcher.
#include <pybind11/pybind11.h>
#include <torch/version.h>

#include <string>

#include "cpu/kernels/batch_invariant.h"
#include "cpu/kernels/kernels.h"

namespace {

pybind11::dict build_info() {
  pybind11::dict info;
  info["torch"] = TORCH_VERSION;
  info["compiler"] = __VERSION__;
#ifdef MOE_EXT_WITH_CUDA
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled part of moe_ext; the operators are in torch.ops.moe_ext.";
  m.def("build_info", &build_info, "What this extension was built with.");
  m.def(
      "cpu_isa", [] { return moe_ext::cpu::kernels::current().isa; },
      "The instruction set that the CPU operators run on.");
  m.def(
      "set_cpu_isa",
      [](const std::string& name) { return moe_ext::cpu::kernels::set_isa(name.c_str()); },
      "Caps the instruction set; False if this machine lacks it.");
  m.def(
      "is_batch_invariant", &moe_ext::cpu::kernels::is_batch_invariant,
      "The batch-invariant mode.");
  m.def(
      "set_batch_invariant", &moe_ext::cpu::kernels::set_batch_invariant, "Switches it on or off.");
}
