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
#include "ops/operands.h"

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

// None in place of a tensor arrives as an undefined one.
inline void check_defined(const char* op, const char* argument, const at::Tensor& tensor) {
  TORCH_CHECK_TYPE(tensor.defined(), op, ": ", argument, " must be a tensor, got None");
}

inline void check_shape(
    const char* op, const char* argument, const at::Tensor& tensor,
    std::initializer_list<Dim> dims) {
  check_defined(op, argument, tensor);
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

// As many experts as any count of ours is kept for: a plan has a number for each.
constexpr int64_t kMostExperts = 1 << 20;

inline void check_num_experts(
    const char* op, const char* argument, const c10::SymInt& num_experts) {
  TORCH_SYM_CHECK(num_experts.sym_gt(0), op, ": ", argument, " must be >= 1, got ", num_experts);
  TORCH_SYM_CHECK(
      num_experts.sym_le(kMostExperts), op, ": ", argument, " must be <= 2^20, got ", num_experts);
}

// Whether a tensor is to have memory of its own: those on meta, fake ones and wrappers have none.
inline bool has_memory(const at::Tensor& tensor) {
  constexpr c10::DispatchKeySet kWrappers(
      {c10::DispatchKey::Python, c10::DispatchKey::Functionalize,
       c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::FuncTorchGradWrapper});
  return tensor.has_storage() && !tensor.key_set().has_any(kWrappers) &&
         tensor.storage().device_type() != at::kMeta;
}

// Memory for all elements. A storage may be freed or shrunk behind its tensors
// (`untyped_storage().resize_(0)`, as FSDP does), and an untyped pointer into it says nothing of
// it. Part of every check of a dtype, since every argument has one of those.
inline void check_memory(const char* op, const char* argument, const at::Tensor& tensor) {
  TORCH_CHECK(
      tensor.layout() == at::kStrided, op, ": ", argument, " must be a dense tensor, got ",
      tensor.layout());
  if (!has_memory(tensor) || tensor.numel() == 0) return;
  const c10::Storage& storage = tensor.storage();
  int64_t elements = tensor.storage_offset() + 1;
  for (int64_t d = 0; d < tensor.dim(); ++d) elements += (tensor.size(d) - 1) * tensor.stride(d);
  const int64_t bytes = elements * static_cast<int64_t>(tensor.itemsize());
  TORCH_CHECK(
      storage.data() != nullptr && bytes <= static_cast<int64_t>(storage.nbytes()), op, ": ",
      argument, " must have its memory, ", bytes, " bytes, got a storage of ", storage.nbytes(),
      " (it was freed or resized)");
}

// Slots, rows and tokens are numbered by int32. To be checked before anything is copied.
inline void check_count(const char* op, const char* argument, const char* counted, int64_t count) {
  TORCH_CHECK(
      count <= std::numeric_limits<int32_t>::max(), op, ": ", argument,
      " must have fewer than 2^31 ", counted, ", got ", count);
}

inline void check_float(const char* op, const char* argument, const at::Tensor& tensor) {
  check_defined(op, argument, tensor);
  TORCH_CHECK(
      is_supported_float(tensor.scalar_type()), op, ": ", argument,
      " must be float64, float32, bfloat16 or float16, got ", tensor.scalar_type());
  check_memory(op, argument, tensor);
}

// What arithmetic runs in.
inline void check_compute_float(const char* op, const char* argument, const at::Tensor& tensor) {
  check_defined(op, argument, tensor);
  TORCH_CHECK(
      tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kDouble, op, ": ", argument,
      " must be float32 or float64, got ", tensor.scalar_type());
  check_memory(op, argument, tensor);
}

inline void check_dtype(
    const char* op, const char* argument, const at::Tensor& tensor, at::ScalarType dtype) {
  check_defined(op, argument, tensor);
  TORCH_CHECK(
      tensor.scalar_type() == dtype, op, ": ", argument, " must be ", dtype, ", got ",
      tensor.scalar_type());
  check_memory(op, argument, tensor);
}

inline void check_ids_dtype(const char* op, const char* argument, const at::Tensor& tensor) {
  check_defined(op, argument, tensor);
  TORCH_CHECK(
      tensor.scalar_type() == at::kLong || tensor.scalar_type() == at::kInt, op, ": ", argument,
      " must be int64 or int32, got ", tensor.scalar_type());
  check_memory(op, argument, tensor);
  // Rows of no ids cost no memory, but whoever counts goes over them.
  if (has_memory(tensor) && tensor.dim() > 0) {
    check_count(op, argument, "rows", tensor.size(0));
  }
}

inline void check_device(
    const char* op, const char* argument, const at::Tensor& tensor, at::Device device) {
  TORCH_CHECK(
      tensor.device() == device, op, ": ", argument, " must be on ", device, ", got ",
      tensor.device());
}

// A tensor with the dtype and on the device of `like`, the argument named so; of the given shape.
inline void check_operand(
    const char* op, const char* argument, const at::Tensor& tensor, const char* like_name,
    const at::Tensor& like, std::initializer_list<Dim> dims) {
  check_shape(op, argument, tensor, dims);
  TORCH_CHECK(
      tensor.scalar_type() == like.scalar_type(), op, ": ", argument, " must be ",
      like.scalar_type(), " like ", like_name, ", got ", tensor.scalar_type(),
      " (cast one of them with .to(), or use torch.autocast)");
  check_memory(op, argument, tensor);
  check_device(op, argument, tensor, like.device());
}

// [E + 1], as from permute.
inline void check_offsets(
    const char* op, const at::Tensor& expert_offsets, const c10::SymInt& num_experts,
    at::Device device) {
  check_dtype(op, "expert_offsets", expert_offsets, at::kInt);
  check_shape(op, "expert_offsets", expert_offsets, {{"E+1", num_experts + 1}});
  check_device(op, "expert_offsets", expert_offsets, device);
}

// pair_tokens [P] of pairs whose experts (or rows) are `like` [P].
inline void check_pair_tokens(
    const char* op, const at::Tensor& pair_tokens, const at::Tensor& like) {
  check_ids_dtype(op, "pair_tokens", pair_tokens);
  check_shape(op, "pair_tokens", pair_tokens, {{"P", like.sym_size(0)}});
  check_device(op, "pair_tokens", pair_tokens, like.device());
}

// [T], of the tokens of `like` [T, ...].
inline void check_token_mask(
    const char* op, const std::optional<at::Tensor>& token_mask, const at::Tensor& like) {
  if (!token_mask) return;
  check_dtype(op, "token_mask", *token_mask, at::kBool);
  check_shape(op, "token_mask", *token_mask, {{"T", like.sym_size(0)}});
  check_device(op, "token_mask", *token_mask, like.device());
}

}  // namespace moe_ext
