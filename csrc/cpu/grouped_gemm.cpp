#include "cpu/grouped_gemm.h"

#include <algorithm>

#include "cpu/kernels/batch_invariant.h"
#include "cpu/operands.h"

namespace moe_ext::cpu {

using kernels::RowBlock;
using kernels::TokenBlock;
using kernels::TypeKernels;

namespace {

// Rows of an expert in equal blocks of at most max_rows.
void split(const RowBlock& rows, int64_t max_rows, std::vector<RowBlock>& blocks) {
  const int64_t count = rows.end - rows.begin;
  if (count == 0) return;
  const int64_t size = ceil_div(count, ceil_div(count, max_rows));
  for (int64_t begin = rows.begin; begin < rows.end; begin += size) {
    blocks.push_back({rows.expert, begin, std::min(begin + size, rows.end), rows.expert_rows});
  }
}

}  // namespace

std::vector<RowBlock> split_rows(const std::vector<RowBlock>& experts, int64_t max_rows) {
  std::vector<RowBlock> blocks;
  for (const RowBlock& expert : experts) split(expert, max_rows, blocks);
  return blocks;
}

std::vector<RowBlock> whole_experts(const std::vector<int64_t>& offsets) {
  const bool invariant = kernels::is_batch_invariant();
  std::vector<RowBlock> blocks;
  for (size_t e = 0; e + 1 < offsets.size(); ++e) {
    const int64_t rows = invariant ? kernels::kManyRows : offsets[e + 1] - offsets[e];
    blocks.push_back({static_cast<int64_t>(e), offsets[e], offsets[e + 1], rows});
  }
  return blocks;
}

int64_t largest_block(const std::vector<RowBlock>& blocks) {
  int64_t rows = 0;
  for (const RowBlock& block : blocks) rows = std::max(rows, block.end - block.begin);
  return rows;
}

namespace {

// How many blocks T tokens are cut into, each of which is cut into `tasks`.
int64_t count_blocks(int64_t T, int64_t tasks, int64_t rows_per_expert) {
  // An expert's weights are packed once per block of tokens, which costs as much as about five rows
  // of their product: 2 % of 256 rows, 8 % of 64.
  constexpr int64_t kGoodRows = 256, kLeastRows = 64;
  // Tasks for all threads of a small machine, and more than one for each.
  constexpr int64_t kTasks = 16;
  // Sums of 8192 x 64 floats are 2 MiB, which the last cache keeps for every thread.
  constexpr int64_t kMostTokens = 8192;
  const int64_t wanted = std::max(rows_per_expert / kGoodRows, ceil_div(kTasks, tasks));
  const int64_t most = std::max<int64_t>(rows_per_expert / kLeastRows, 1);
  return std::max({std::min(wanted, most), ceil_div(T, kMostTokens), int64_t{1}});
}

}  // namespace

TokenBlocks::TokenBlocks(
    const std::vector<RowBlock>& experts, const int32_t* token, int64_t T, int64_t tasks,
    int64_t max_rows) {
  std::vector<RowBlock> left;  // rows that are in no block yet
  for (const RowBlock& expert : experts) {
    if (expert.begin < expert.end) left.push_back(expert);
  }
  // Without an index a block holds few experts with all their rows, and splits two of them at most.
  const int64_t groups = token ? std::max<int64_t>(left.size(), 1) : 1;
  const int64_t N = experts.empty() ? 0 : experts.back().end;
  const int64_t size = std::max<int64_t>(ceil_div(T, count_blocks(T, tasks, N / groups)), 1);
  for (int64_t begin = 0; begin < T; begin += size) {
    const int64_t end = std::min(begin + size, T);
    const int64_t first_block = rows.size();
    for (RowBlock& expert : left) {
      const int64_t stop =
          token ? std::lower_bound(token + expert.begin, token + expert.end, end) - token
                : std::clamp(end, expert.begin, expert.end);
      split({expert.expert, expert.begin, stop, expert.expert_rows}, max_rows, rows);
      expert.begin = stop;
    }
    tokens.push_back({begin, end, first_block, static_cast<int64_t>(rows.size())});
  }
}

namespace {

// One task for each of `count` things and each of its columns; neighbouring tasks share rows.
template <class Fn>
Job col_job(int64_t count, int64_t cols, const Fn& fn) {
  return {count * cols, [fn, cols](int64_t task, bool next, void* scratch) {
            const int64_t col = task % cols;
            fn(task / cols, col, next && col + 1 < cols, scratch);
          }};
}

}  // namespace

int64_t blocks_per_task(
    const kernels::Weights& weights, int64_t N, int64_t element_size, int64_t rows, int64_t most) {
  // Bytes. The hardware's prefetching stops at the end of a page, which four such rows fill:
  // reading 128 bytes of each waits for every one of them.
  constexpr int64_t kFar = 1024;
  // With many rows the weights are read seldom, and the sums of the blocks need the cache.
  constexpr int64_t kFewRows = 192;
  const bool far_rows = weights.k_stride != 1 && weights.k_stride * element_size >= kFar;
  const bool wide = N >= most * kernels::kBlockN;
  return far_rows && wide && rows < kFewRows ? most : 1;
}

int64_t product_scratch(
    const TypeKernels& kernels, const TokenBlocks& blocks, const kernels::ProductArgs& args,
    bool wide) {
  int64_t tokens = 0;
  for (const TokenBlock& block : blocks.tokens) tokens = std::max(tokens, block.end - block.begin);
  const int64_t numbers = (tokens + 1) * args.n_blocks * kernels::kBlockN;
  return numbers * static_cast<int64_t>(wide ? 8 : 4) +
         kernels.scratch_bytes(largest_block(blocks.rows), args.K, args.n_blocks);
}

Job up_job(
    const TypeKernels& kernels, const kernels::UpArgs& args, const std::vector<RowBlock>& blocks) {
  return col_job(
      blocks.size(), column_tasks(args.gated ? 2 * args.I : args.I, args.n_blocks),
      [&](int64_t i, int64_t col, bool next, void* scratch) {
        kernels.up(args, blocks[i], col, next, scratch);
      });
}

Job product_job(
    const TypeKernels& kernels, const kernels::ProductArgs& args, const TokenBlocks& blocks) {
  return col_job(
      blocks.tokens.size(), column_tasks(args.N, args.n_blocks),
      [&](int64_t i, int64_t col, bool next, void* scratch) {
        kernels.product(args, blocks.rows.data(), blocks.tokens[i], col, next, scratch);
      });
}

Job grad_hidden_job(
    const TypeKernels& kernels, const kernels::GradHiddenArgs& args,
    const std::vector<RowBlock>& blocks) {
  return col_job(
      blocks.size(), column_tasks(args.I, args.n_blocks),
      [&](int64_t i, int64_t col, bool next, void* scratch) {
        kernels.grad_hidden(args, blocks[i], col, next, scratch);
      });
}

Job grad_weights_job(
    const TypeKernels& kernels, const kernels::GradWeightsArgs& args,
    const std::vector<RowBlock>& experts) {
  const int64_t m_blocks = ceil_div(args.M, kernels::kGradBlockM);
  const int64_t n_blocks = ceil_div(args.N, kernels::kGradBlockN);
  const int64_t count = experts.size();
  return {
      count * m_blocks * n_blocks,
      [&kernels, &args, &experts, m_blocks, n_blocks](int64_t task, bool, void* scratch) {
        const int64_t n_block = task % n_blocks;
        const int64_t m_block = task / n_blocks % m_blocks;
        kernels.grad_weights(args, experts[task / n_blocks / m_blocks], m_block, n_block, scratch);
      }};
}

Job column_sum_job(
    const TypeKernels& kernels, const kernels::ColumnSumArgs& args,
    const std::vector<RowBlock>& experts) {
  const int64_t cols = column_blocks(args.M);
  const int64_t count = experts.size();
  return {count * cols, [&kernels, &args, &experts, cols](int64_t task, bool, void*) {
            kernels.column_sum(args, experts[task / cols], task % cols);
          }};
}

void grouped_product(
    const at::Tensor& rows, const std::vector<int64_t>& offsets, const kernels::Weights& weights,
    const at::Tensor& bias, const at::Tensor& out) {
  const auto& kernels = kernels_for(rows.scalar_type());
  const int64_t N = out.size(1);
  const kernels::ProductArgs args{
      rows.size(1),
      N,
      rows_of(rows),
      weights,
      bias_of(bias),
      nullptr,
      nullptr,
      out.mutable_data_ptr(),
      blocks_per_task(
          weights, N, rows.element_size(),
          offsets.back() / std::max<int64_t>(offsets.size() - 1, 1), kernels::kForwardNBlocks)};
  const TokenBlocks blocks(
      whole_experts(offsets), nullptr, rows.size(0), column_tasks(N, args.n_blocks),
      kernels.max_block_rows);
  run_phases(
      {{product_job(kernels, args, blocks)}},
      product_scratch(kernels, blocks, args, rows.scalar_type() == at::kDouble),
      estimate_nanoseconds(offsets.back() * rows.size(1) * out.size(1), 0));
}

}  // namespace moe_ext::cpu
