// All kernels of one instruction set.
#pragma once

#include "cpu/kernels/experts.h"
#include "cpu/kernels/router.h"

namespace moe_ext::cpu::kernels {
namespace {

template <class S>
constexpr TypeKernels packed_table() {
  return Experts<S, Packed<S>>::forward_table();
}

constexpr Kernels make_table(const char* isa) {
  return {
      isa,
      {Experts<double>::table(), Experts<float>::table(), Experts<bf16>::table(),
       Experts<f16>::table()},
      {packed_table<double>(), packed_table<float>(), packed_table<bf16>(), packed_table<f16>()},
      {Router<double>::table(), Router<float>::table()}};
}

}  // namespace
}  // namespace moe_ext::cpu::kernels
