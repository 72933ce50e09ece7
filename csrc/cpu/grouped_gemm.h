// Matrix products over rows grouped by expert, as jobs for run_phases. How rows are cut depends on
// shapes and routing alone.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "cpu/kernels/kernels.h"
#include "cpu/parallel.h"

namespace moe_ext::cpu {

inline int64_t piece_cols(int64_t columns) { return ceil_div(columns, kernels::kPieceCols); }

// The rows of every expert in equal chunks of at most max_rows; idle experts have none.
std::vector<kernels::RowChunk> row_chunks(const std::vector<int64_t>& offsets, int64_t max_rows);

// All rows of an expert as one chunk, empty or not.
std::vector<kernels::RowChunk> expert_chunks(const std::vector<int64_t>& offsets);

int64_t largest_chunk(const std::vector<kernels::RowChunk>& chunks);

// Where a sum over an expert's rows goes: tokens in blocks, and the rows of every block.
struct TokenBlocks {
  std::vector<kernels::TokenBlock> blocks;
  std::vector<kernels::RowChunk> chunks;

  // T tokens; token [N] of each row, ascending within an expert, or null: row r is token r;
  // `pieces` that a block is cut into along the result's columns.
  TokenBlocks(
      const std::vector<int64_t>& offsets, const int32_t* token, int64_t T, int64_t pieces,
      int64_t max_rows);
};

// How many pieces side by side are one (kernels.h), for products with `weights` of N columns and
// chunks of about `rows` rows.
int64_t count_parts(const kernels::Weights& weights, int64_t N, int64_t element_size, int64_t rows);

// The pieces that N columns are cut into.
inline int64_t part_pieces(int64_t N, int64_t parts) {
  return ceil_div(N, parts * kernels::kPieceCols);
}

// Whether weights' gradients of so many bytes are written past the caches.
inline bool streams(int64_t bytes) { return bytes > 16 << 20; }

// Bytes of scratch for a combine piece.
int64_t combine_scratch(
    const kernels::TypeKernels& kernels, const TokenBlocks& blocks,
    const kernels::CombineArgs& args, bool wide);

Job up_job(
    const kernels::TypeKernels& kernels, const kernels::UpArgs& args,
    const std::vector<kernels::RowChunk>& chunks);
Job combine_job(
    const kernels::TypeKernels& kernels, const kernels::CombineArgs& args,
    const TokenBlocks& blocks);
Job grad_hidden_job(
    const kernels::TypeKernels& kernels, const kernels::GradHiddenArgs& args,
    const std::vector<kernels::RowChunk>& chunks);
Job grad_weights_job(
    const kernels::TypeKernels& kernels, const kernels::GradWeightsArgs& args,
    const std::vector<kernels::RowChunk>& experts);
Job column_sum_job(
    const kernels::TypeKernels& kernels, const kernels::ColumnSumArgs& args,
    const std::vector<kernels::RowChunk>& experts);

// out [N, .] = rows [N, K] of each expert times its weights, plus its bias (or undefined); rows
// past the last expert's are zeros. rows: with_dense_rows.
void grouped_product(
    const at::Tensor& rows, const std::vector<int64_t>& offsets, const kernels::Weights& weights,
    const at::Tensor& bias, const at::Tensor& out);

}  // namespace moe_ext::cpu
