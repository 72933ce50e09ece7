// Matrix products over rows grouped by expert: those of expert e are [offsets[e], offsets[e + 1]).
// The offsets stay on the device: nothing is read back, and the same launches serve any routing.
#pragma once

#include <ATen/core/Tensor.h>

#include "cuda/kernels/kernels.h"

namespace moe_ext::cuda {

// offsets: [E + 1] int32, contiguous.
kernels::RowGroups row_groups(const at::Tensor& rows, const at::Tensor& offsets);

// [N, O]: rows [N, K] times weights[e]^T, weights [E, O, K] of any strides; rows at or past
// offsets[E] are undefined.
at::Tensor grouped_product(
    const at::Tensor& rows, const at::Tensor& offsets, const at::Tensor& weights);

// [E, M, N]: the sum over e's rows of left[r]^T right[r]; left [., M], right [., N].
at::Tensor grouped_grad_weights(
    const at::Tensor& left, const at::Tensor& right, const at::Tensor& offsets);

// The same as the gradient of weight [E, M, N], in its layout (empty_grad_of_weight).
at::Tensor grouped_grad_of_weight(
    const at::Tensor& left, const at::Tensor& right, const at::Tensor& offsets,
    const at::Tensor& weight);

// [E, N]: the sum over e's rows of weight(r) * rows[r]; kernels.h has the arguments.
at::Tensor grouped_sum(
    const at::Tensor& rows, const at::Tensor& offsets, const at::Tensor& weights,
    const at::Tensor& slot_of_row);

// In place: rows[r] = weights[r] * (rows[r] + bias[e]), zeros at or past offsets[E]; weights and
// bias, contiguous, may be undefined.
void weigh_rows(
    const at::Tensor& rows, const at::Tensor& offsets, const at::Tensor& bias,
    const at::Tensor& weights);

}  // namespace moe_ext::cuda
