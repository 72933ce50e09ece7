// All kernels of one instruction set.
#pragma once

#include "cpu/kernels/experts.h"
#include "cpu/kernels/router.h"

namespace moe_ext::cpu::kernels {
namespace {

constexpr Kernels make_table(const char* isa) {
  return {
      isa,
      {Experts<double>::table(), Experts<float>::table(), Experts<bf16>::table(),
       Experts<f16>::table()},
      {Router<double>::table(), Router<float>::table()}};
}

}  // namespace
}  // namespace moe_ext::cpu::kernels
