// Matrix products over rows grouped by expert, as jobs for run_phases. How rows are cut depends on
// shapes and routing alone.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "cpu/kernels/kernels.h"
#include "cpu/parallel.h"

namespace moe_ext::cpu {

inline int64_t column_blocks(int64_t columns) { return ceil_div(columns, kernels::kBlockN); }

// All rows of an expert as one block, empty or not; here the batch-invariant mode is read.
std::vector<kernels::RowBlock> whole_experts(const std::vector<int64_t>& offsets);

// The rows of every expert in equal blocks of at most max_rows; idle experts have none.
std::vector<kernels::RowBlock> split_rows(
    const std::vector<kernels::RowBlock>& experts, int64_t max_rows);

int64_t largest_block(const std::vector<kernels::RowBlock>& blocks);

// Where a sum over an expert's rows goes: tokens in blocks, and the rows of every block.
struct TokenBlocks {
  std::vector<kernels::TokenBlock> tokens;
  std::vector<kernels::RowBlock> rows;

  // The rows of whole experts; T tokens; token [N] of each row, ascending within an expert, or
  // null: row r is token r; `tasks` that a block is cut into along the result's columns.
  TokenBlocks(
      const std::vector<kernels::RowBlock>& experts, const int32_t* token, int64_t T, int64_t tasks,
      int64_t max_rows);
};

// How many blocks of columns side by side are one task (kernels.h), for products with `weights` of
// N columns and blocks of about `rows` rows: 1, or `most` if rows of weights^T lie far apart.
int64_t blocks_per_task(
    const kernels::Weights& weights, int64_t N, int64_t element_size, int64_t rows, int64_t most);

// The tasks that N columns are cut into.
inline int64_t column_tasks(int64_t N, int64_t n_blocks) {
  return ceil_div(N, n_blocks * kernels::kBlockN);
}

// Whether weights' gradients of so many bytes are written past the caches.
inline bool streams(int64_t bytes) { return bytes > 16 << 20; }

// Bytes of scratch for a task of product_job.
int64_t product_scratch(
    const kernels::TypeKernels& kernels, const TokenBlocks& blocks,
    const kernels::ProductArgs& args, bool wide);

Job up_job(
    const kernels::TypeKernels& kernels, const kernels::UpArgs& args,
    const std::vector<kernels::RowBlock>& blocks);
Job product_job(
    const kernels::TypeKernels& kernels, const kernels::ProductArgs& args,
    const TokenBlocks& blocks);
Job grad_hidden_job(
    const kernels::TypeKernels& kernels, const kernels::GradHiddenArgs& args,
    const std::vector<kernels::RowBlock>& blocks);
Job grad_weights_job(
    const kernels::TypeKernels& kernels, const kernels::GradWeightsArgs& args,
    const std::vector<kernels::RowBlock>& experts);
Job column_sum_job(
    const kernels::TypeKernels& kernels, const kernels::ColumnSumArgs& args,
    const std::vector<kernels::RowBlock>& experts);

// out [N, .] = rows [N, K] of each expert times its weights, plus its bias (or undefined); rows
// past the last expert's are zeros. rows: with_dense_rows.
void grouped_product(
    const at::Tensor& rows, const std::vector<int64_t>& offsets, const kernels::Weights& weights,
    const at::Tensor& bias, const at::Tensor& out);

}  // namespace moe_ext::cpu
