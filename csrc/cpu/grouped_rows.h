// Work over rows that are grouped by expert: the blocks it is cut into, and how a block's operands
// are read. Blocks depend on the routing alone, so bits don't hang on the number of threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <vector>

#include "ops/dtypes.h"

namespace moe_ext::cpu {

struct RowBlock {
  int64_t expert;
  int64_t begin;
  int64_t end;
  int64_t size() const { return end - begin; }
};

// expert_offsets as numbers, checked: ascending from 0, the last at most num_rows.
inline std::vector<int64_t> read_offsets(
    const char* op, const at::Tensor& expert_offsets_, int64_t num_rows) {
  const at::Tensor expert_offsets = expert_offsets_.contiguous();
  const int32_t* data = expert_offsets.const_data_ptr<int32_t>();
  std::vector<int64_t> offsets(data, data + expert_offsets.numel());
  TORCH_CHECK_INDEX(
      offsets.front() == 0 && std::is_sorted(offsets.begin(), offsets.end()) &&
          offsets.back() <= num_rows,
      op, ": expert_offsets must ascend from 0 to at most N=", num_rows, ", got ",
      c10::ArrayRef<int64_t>(offsets));
  return offsets;
}

inline std::vector<RowBlock> row_blocks(const std::vector<int64_t>& offsets) {
  constexpr int64_t kRowsPerBlock = 256;
  std::vector<RowBlock> blocks;
  for (size_t e = 0; e + 1 < offsets.size(); ++e) {
    for (int64_t begin = offsets[e]; begin < offsets[e + 1]; begin += kRowsPerBlock) {
      const int64_t end = std::min(begin + kRowsPerBlock, offsets[e + 1]);
      blocks.push_back({static_cast<int64_t>(e), begin, end});
    }
  }
  return blocks;
}

// Runs fn(i) for i in [0, count) in parallel. ATen calls in fn must reach the CPU kernels at once:
// worker threads know nothing of the caller's grad mode, and autocast has done its part already.
template <class Fn>
void parallel_each(int64_t count, const Fn& fn) {
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    for (int64_t i = begin; i < end; ++i) fn(i);
  });
}

// The block's rows of source in dtype; row r is source[index[r]], or source[r] without an index.
inline at::Tensor read_block(
    const at::Tensor& source, const at::Tensor& index, const RowBlock& block,
    at::ScalarType dtype) {
  const at::Tensor rows = index.defined()
                              ? source.index_select(0, index.narrow(0, block.begin, block.size()))
                              : source.narrow(0, block.begin, block.size());
  return rows.to(dtype);
}

inline void write_block(const at::Tensor& target, const RowBlock& block, const at::Tensor& rows) {
  target.narrow(0, block.begin, block.size()).copy_(rows);
}

// Rounds to an operand's dtype, kept in the dtype that products are summed in.
inline at::Tensor round_to(const at::Tensor& values, at::ScalarType dtype) {
  return values.to(dtype).to(values.scalar_type());
}

inline void zero_tail(const at::Tensor& rows, int64_t begin) {
  rows.narrow(0, begin, rows.size(0) - begin).zero_();
}

}  // namespace moe_ext::cpu
