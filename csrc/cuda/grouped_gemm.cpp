#include "cuda/grouped_gemm.h"

#include <ATen/Context.h>
#include <ATen/ops/_grouped_mm.h>
#include <ATen/ops/empty.h>

#include <algorithm>

#include "cuda/operands.h"

namespace moe_ext::cuda {
namespace {

// For fp32, torch's own switch for matrix products.
bool allows_tf32(const at::Tensor& rows) {
  return rows.scalar_type() == at::kFloat &&
         at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) ==
             at::Float32Precision::TF32;
}

// The tensor itself if its rows or its columns are dense, else a copy.
at::Tensor with_dense_weights(const at::Tensor& weights) {
  return weights.stride(1) == 1 || weights.stride(2) == 1 ? weights : weights.contiguous();
}

// What torch's grouped product needs of a matrix, or a stack of them: one dense dimension, all
// else in steps of 16 bytes.
bool torch_takes(const at::Tensor& tensor) {
  constexpr int64_t kStep = 8;  // elements of bf16
  const int64_t row = tensor.stride(-2), column = tensor.stride(-1);
  const int64_t rows = tensor.size(-2), columns = tensor.size(-1);
  const bool row_major = column == 1 && row % kStep == 0 && row >= columns;
  const bool column_major = row == 1 && column % kStep == 0 && column >= rows;
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0 &&
         (row_major || column_major) && rows > 1 && columns > 1 &&
         (tensor.dim() == 2 || tensor.stride(0) % kStep == 0);
}

// Whether at::_grouped_mm has a kernel for these: elsewhere it copies the offsets to the host and
// goes expert by expert. It is a private function, whose contract is read from torch 2.11 to 2.15.
bool torch_serves(const at::Tensor& rows, int64_t num_experts) {
  if (rows.scalar_type() != at::kBFloat16 || num_experts >= 1024) return false;
  int major = 0;
  C10_CUDA_CHECK(
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, rows.device().index()));
  return major == 9 || major == 10;
}

// With so few rows the time is that of reading weights. Estimated, not measured: at 2 rows each
// the multiply-adds of a weight hide behind reading it. [decode rows of bench_moe_cuda.py]
bool are_few(int64_t rows, int64_t num_experts) {
  return rows <= std::max<int64_t>(64, 2 * num_experts);
}

}  // namespace

kernels::RowGroups row_groups(const at::Tensor& rows, const at::Tensor& offsets) {
  return {type_of(rows), rows.size(0), offsets.size(0) - 1, offsets.const_data_ptr<int32_t>()};
}

at::Tensor grouped_product(
    const at::Tensor& rows_, const at::Tensor& offsets, const at::Tensor& weights_) {
  const WithoutAutogradAndAutocast plain;
  const at::Tensor rows = rows_.contiguous(), weights = with_dense_weights(weights_);
  const int64_t N = weights.size(1), K = weights.size(2);
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const bool k_dense = weights.stride(2) == 1;
  const bool few = k_dense && are_few(rows.size(0), weights.size(0));
  if (!few && torch_serves(rows, weights.size(0)) && torch_takes(rows) && torch_takes(weights) &&
      N % 8 == 0) {
    return at::_grouped_mm(rows, weights.transpose(1, 2), offsets.slice(0, 1), {}, {});
  }
  const at::Tensor out = at::empty({rows.size(0), N}, rows.options());
  const kernels::ProductArgs args{
      row_groups(rows, offsets),
      N,
      K,
      rows.const_data_ptr(),
      K,
      weights.const_data_ptr(),
      weights.stride(0),
      weights.stride(1),
      weights.stride(2),
      out.mutable_data_ptr(),
      allows_tf32(rows)};
  if (few) {
    kernels::grouped_product_of_few_rows(args, stream);
  } else {
    kernels::grouped_product(args, stream);
  }
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

at::Tensor grouped_grad_weights(
    const at::Tensor& left_, const at::Tensor& right_, const at::Tensor& offsets) {
  const WithoutAutogradAndAutocast plain;
  const at::Tensor left = left_.contiguous(), right = right_.contiguous();
  const int64_t E = offsets.size(0) - 1, M = left.size(1), N = right.size(1);
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const kernels::RowGroups groups = row_groups(left, offsets);
  if (torch_serves(left, E) && torch_takes(left) && torch_takes(right)) {
    const at::Tensor grad = at::_grouped_mm(left.t(), right, offsets.slice(0, 1), {}, {});
    kernels::zero_idle_experts(groups, M * N, grad.mutable_data_ptr(), stream);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    return grad;
  }
  const at::Tensor grad = at::empty({E, M, N}, left.options());
  kernels::grouped_grad_weights(
      {groups, M, N, left.const_data_ptr(), right.const_data_ptr(), grad.mutable_data_ptr(),
       allows_tf32(left)},
      stream);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return grad;
}

at::Tensor grouped_grad_of_weight(
    const at::Tensor& left, const at::Tensor& right, const at::Tensor& offsets,
    const at::Tensor& weight) {
  if (!is_transposed(weight)) return grouped_grad_weights(left, right, offsets);
  return grouped_grad_weights(right, left, offsets).transpose(1, 2);
}

at::Tensor grouped_sum(
    const at::Tensor& rows_, const at::Tensor& offsets, const at::Tensor& weights,
    const at::Tensor& slot_of_row) {
  const at::Tensor rows = rows_.contiguous();
  const at::Tensor sum = at::empty({offsets.size(0) - 1, rows.size(1)}, rows.options());
  kernels::sum_rows(
      row_groups(rows, offsets), rows.const_data_ptr(), any_data_or_null(weights),
      data_or_null<int32_t>(slot_of_row), rows.size(1), sum.mutable_data_ptr(),
      c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return sum;
}

void weigh_rows(
    const at::Tensor& rows, const at::Tensor& offsets, const at::Tensor& bias,
    const at::Tensor& weights) {
  kernels::weigh_rows(
      row_groups(rows, offsets), any_data_or_null(bias), any_data_or_null(weights), rows.size(1),
      rows.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace moe_ext::cuda
