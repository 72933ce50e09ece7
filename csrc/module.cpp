// moe_ext._C: importing it runs the operators' registrations. It exposes facts of the build and of
// the machine, and the operators, which take tensors to the dispatcher and nowhere else.
#include <pybind11/pybind11.h>
#include <torch/version.h>

#include <string>

#include "cpu/kernels/batch_invariant.h"
#include "cpu/kernels/kernels.h"
#include "cpu/memory/block_cache.h"
#include "python/call.h"
#include "python/main_grad.h"

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

pybind11::dict memory_stats() {
  const auto stats = moe_ext::cpu::memory::BlockCache::instance().stats();
  pybind11::dict dict;
  dict["bytes_in_use"] = stats.bytes_in_use;
  dict["bytes_held"] = stats.bytes_held;
  dict["hits"] = stats.hits;
  dict["misses"] = stats.misses;
  return dict;
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
  m.def("memory_stats", &memory_stats, "Of the cache of large blocks.");
  m.def(
      "empty_cache", [] { moe_ext::cpu::memory::BlockCache::instance().empty(); },
      "Gives back the blocks that are held.");
  m.def(
      "set_memory_limit",
      [](int64_t bytes) { moe_ext::cpu::memory::BlockCache::instance().set_limit(bytes); },
      "The most bytes that are held.");
  m.def(
      "operator",
      [](const std::string& name) {
        PyObject* function = moe_ext::python::make_call(name.c_str());
        if (!function) throw pybind11::error_already_set();
        return pybind11::reinterpret_steal<pybind11::object>(function);
      },
      "An operator as a function of plain arguments, see csrc/python/call.h.");
  m.def(
      "is_batch_invariant", &moe_ext::cpu::kernels::is_batch_invariant,
      "The batch-invariant mode.");
  m.def(
      "set_batch_invariant", &moe_ext::cpu::kernels::set_batch_invariant, "Switches it on or off.");
  moe_ext::python::set_main_grad();
}
