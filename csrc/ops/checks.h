// The checks of every contract. Sizes are symbolic, so that the same contract serves real tensors
// and the Meta kernels under torch.compile.
//
// Grammar of a message: `op: argument must be <shape or property>, got <value>`. Shapes, dtypes
// and devices raise RuntimeError, options ValueError, ids and offsets IndexError.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymBool.h>
#include <c10/core/SymInt.h>
#include <c10/util/Exception.h>

#include <initializer_list>
#include <limits>
#include <optional>
#include <sstream>
#include <string>

#include "ops/dtypes.h"

namespace moe_ext {

// One dimension of an expected shape: a letter, and its size where it is already known.
struct Dim {
  const char* letter;
  std::optional<c10::SymInt> size = std::nullopt;
};

inline std::string shape_text(std::initializer_list<Dim> dims) {
  std::ostringstream text;
  text << "[";
  const char* separator = "";
  for (const Dim& dim : dims) {
    text << separator << dim.letter;
    if (dim.size) text << "=" << *dim.size;
    separator = ", ";
  }
  text << "]";
  return text.str();
}

inline void check_shape(
    const char* op, const char* argument, const at::Tensor& tensor,
    std::initializer_list<Dim> dims) {
  TORCH_CHECK(
      tensor.dim() == static_cast<int64_t>(dims.size()), op, ": ", argument, " must be ",
      shape_text(dims), ", got ", tensor.sym_sizes());
  int64_t i = 0;
  for (const Dim& dim : dims) {
    if (dim.size) {
      TORCH_SYM_CHECK(
          tensor.sym_size(i).sym_eq(*dim.size), op, ": ", argument, " must be ", shape_text(dims),
          ", got ", tensor.sym_sizes());
    }
    ++i;
  }
}

// At least one in every dimension that is not the tokens'.
inline void check_positive(
    const char* op, const char* argument, const char* letter, const c10::SymInt& size) {
  TORCH_SYM_CHECK(
      size.sym_gt(0), op, ": ", argument, " must have ", letter, " >= 1, got ", letter, "=", size);
}

inline void check_float(const char* op, const char* argument, const at::Tensor& tensor) {
  TORCH_CHECK(
      is_supported_float(tensor.scalar_type()), op, ": ", argument,
      " must be float64, float32, bfloat16 or float16, got ", tensor.scalar_type());
}

inline void check_dtype(
    const char* op, const char* argument, const at::Tensor& tensor, at::ScalarType dtype) {
  TORCH_CHECK(
      tensor.scalar_type() == dtype, op, ": ", argument, " must be ", dtype, ", got ",
      tensor.scalar_type());
}

inline void check_ids_dtype(const char* op, const char* argument, const at::Tensor& tensor) {
  TORCH_CHECK(
      tensor.scalar_type() == at::kLong || tensor.scalar_type() == at::kInt, op, ": ", argument,
      " must be int64 or int32, got ", tensor.scalar_type());
}

inline void check_device(
    const char* op, const char* argument, const at::Tensor& tensor, at::Device device) {
  TORCH_CHECK(
      tensor.device() == device, op, ": ", argument, " must be on ", device, ", got ",
      tensor.device());
}

// Slots and rows are numbered by int32.
inline void check_slot_count(const char* op, const char* argument, const at::Tensor& ids) {
  TORCH_CHECK(
      ids.numel() <= std::numeric_limits<int32_t>::max(), op, ": ", argument,
      " must have fewer than 2^31 slots, got ", ids.numel());
}

// A tensor with tokens' dtype, on tokens' device, of the given shape.
inline void check_operand(
    const char* op, const char* argument, const at::Tensor& tensor, const at::Tensor& tokens,
    std::initializer_list<Dim> dims) {
  check_shape(op, argument, tensor, dims);
  check_dtype(op, argument, tensor, tokens.scalar_type());
  check_device(op, argument, tensor, tokens.device());
}

}  // namespace moe_ext
