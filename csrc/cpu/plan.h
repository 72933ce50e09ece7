// Where every slot (t, k), or pair, goes. A plan that is made here is right by construction; one
// that comes as an argument is checked.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "cpu/kernels/plan.h"
#include "ops/permute.h"

namespace moe_ext::cpu {

struct Plan {
  at::Tensor row_map;                // [T, K] or [P] int32, -1 for a skipped slot
  at::Tensor expert_offsets;         // [E + 1] int32
  std::vector<int32_t> slot_of_row;  // of the rows before expert_offsets[E]; empty if not needed
};

inline void check_id(const char* op, const char* argument, int64_t id) {
  TORCH_CHECK_INDEX(id >= -1, op, ": ", argument, " must be >= -1, got ", id);
}

template <class Id>
void check_ids(const char* op, const char* argument, const Id* ids, int64_t n) {
  const int64_t bad = kernels::find_bad_id(ids, n);
  if (bad < n) check_id(op, argument, ids[bad]);
}

// topk_ids as numbers, checked: -1 or more.
inline at::Tensor read_ids(const char* op, const at::Tensor& topk_ids) {
  const at::Tensor ids = contiguous_in(topk_ids, at::kLong);
  check_ids(op, "topk_ids", ids.const_data_ptr<int64_t>(), ids.numel());
  return ids;
}

// The plan of contiguous ids, [T, K] or [P], in `order` (or null: as they come).
template <class Id>
Plan make_plan(
    const char* op, const char* argument, const at::Tensor& shaped_so, const Id* ids,
    const int32_t* order, int64_t num_experts, bool with_inverse = true) {
  const int64_t N = shaped_so.numel();
  check_ids(op, argument, ids, N);
  const auto [row_map, expert_offsets] = empty_plan(shaped_so, num_experts);
  Plan plan{row_map, expert_offsets, std::vector<int32_t>(with_inverse ? N : 0)};
  int32_t* offsets = plan.expert_offsets.mutable_data_ptr<int32_t>();
  kernels::make_plan(
      ids, order, N, num_experts, plan.row_map.mutable_data_ptr<int32_t>(), offsets,
      with_inverse ? plan.slot_of_row.data() : nullptr);
  if (with_inverse) plan.slot_of_row.resize(offsets[num_experts]);
  return plan;
}

inline Plan make_plan(
    const char* op, const at::Tensor& topk_ids, int64_t num_experts, bool with_inverse = true) {
  check_count(op, "topk_ids", "slots", topk_ids.numel());
  const at::Tensor ids = topk_ids.contiguous();
  const auto plan = [&](const auto* id) {
    return make_plan(op, "topk_ids", ids, id, nullptr, num_experts, with_inverse);
  };
  return ids.scalar_type() == at::kLong ? plan(ids.const_data_ptr<int64_t>())
                                        : plan(ids.const_data_ptr<int32_t>());
}

// pair_tokens [P] as numbers, checked: in [-1, T).
inline at::Tensor read_pair_tokens(const char* op, const at::Tensor& pair_tokens_, int64_t T) {
  check_count(op, "tokens", "tokens", T);
  check_count(op, "pair_tokens", "pairs", pair_tokens_.numel());
  const at::Tensor pair_tokens = contiguous_in(pair_tokens_, at::kLong);
  const int64_t* tokens = pair_tokens.const_data_ptr<int64_t>();
  for (int64_t p = 0; p < pair_tokens.numel(); ++p) {
    TORCH_CHECK_INDEX(
        tokens[p] >= -1 && tokens[p] < T, op, ": pair_tokens must be in [-1, T=", T, "), got ",
        tokens[p]);
  }
  return pair_tokens;
}

// The plan of pairs [P] in any order. pair_tokens: read_pair_tokens.
inline Plan make_pair_plan(
    const char* op, const at::Tensor& pair_experts, const at::Tensor& pair_tokens, int64_t T,
    int64_t num_experts) {
  const at::Tensor experts = contiguous_in(pair_experts, at::kLong);
  const int64_t* expert = experts.const_data_ptr<int64_t>();
  const int64_t* token = pair_tokens.const_data_ptr<int64_t>();
  std::vector<int64_t> used(expert, expert + experts.numel());
  for (size_t p = 0; p < used.size(); ++p) {
    if (token[p] < 0) used[p] = -1;
  }
  const std::vector<int32_t> order = kernels::order_by_token(token, experts.numel(), T);
  return make_plan(op, "pair_experts", pair_experts, used.data(), order.data(), num_experts);
}

// expert_offsets as numbers, of a plan that was made or read.
inline std::vector<int64_t> offsets_of(const at::Tensor& expert_offsets) {
  const int32_t* data = expert_offsets.const_data_ptr<int32_t>();
  return {data, data + expert_offsets.numel()};
}

// expert_offsets as numbers, checked: ascending from 0, the last at most num_rows.
inline std::vector<int64_t> read_offsets(
    const char* op, const at::Tensor& expert_offsets, int64_t num_rows) {
  check_count(op, "rows", "rows", num_rows);
  std::vector<int64_t> offsets = offsets_of(expert_offsets.contiguous());
  TORCH_CHECK_INDEX(
      offsets.front() == 0 && std::is_sorted(offsets.begin(), offsets.end()) &&
          offsets.back() <= num_rows,
      op, ": expert_offsets must ascend from 0 to at most N=", num_rows, ", got ",
      c10::ArrayRef<int64_t>(offsets));
  return offsets;
}

// take(slot, row), called for every slot with a row, returns whether no slot had that row before;
// row_map checked: -1 or a row, no row twice.
template <class Fn>
void for_slots(const char* op, const at::Tensor& row_map_, int64_t num_rows, const Fn& take) {
  check_count(op, "row_map", "slots", row_map_.numel());
  check_count(op, "row_map", "rows", row_map_.size(0));
  const at::Tensor row_map = row_map_.contiguous();
  const auto [fault, row] =
      kernels::for_slots(row_map.const_data_ptr<int32_t>(), row_map.numel(), num_rows, take);
  TORCH_CHECK_INDEX(
      fault != kernels::RowMapFault::kOutside, op, ": row_map must be -1 or in [0, N=", num_rows,
      "), got ", row);
  TORCH_CHECK_INDEX(
      fault != kernels::RowMapFault::kTwice, op, ": row_map must name a row once at most, got row ",
      row, " twice");
}

// A bit for every row: there may be many without memory, [N, 0].
inline void check_row_map(const char* op, const at::Tensor& row_map, int64_t num_rows) {
  check_count(op, "rows", "rows", num_rows);
  std::vector<bool> taken(num_rows, false);
  for_slots(op, row_map, num_rows, [&](int32_t, int32_t row) {
    const bool is_first = !taken[row];
    taken[row] = true;
    return is_first;
  });
}

// The slot (flat index into row_map) of every row; -1 where no slot has the row.
inline std::vector<int32_t> invert_row_map(
    const char* op, const at::Tensor& row_map, int64_t num_rows) {
  check_count(op, "rows", "rows", num_rows);
  std::vector<int32_t> slot_of_row(num_rows, -1);
  for_slots(op, row_map, num_rows, [&](int32_t slot, int32_t row) {
    return std::exchange(slot_of_row[row], slot) == -1;
  });
  return slot_of_row;
}

// A plan that comes as an argument, checked: every row before expert_offsets[E] has a slot.
inline Plan read_plan(
    const char* op, const at::Tensor& row_map, const at::Tensor& expert_offsets_) {
  const at::Tensor expert_offsets = expert_offsets_.contiguous();
  const int64_t num_rows = read_offsets(op, expert_offsets, row_map.numel()).back();
  Plan plan{row_map, expert_offsets, invert_row_map(op, row_map, row_map.numel())};
  plan.slot_of_row.resize(num_rows);
  for (int64_t r = 0; r < num_rows; ++r) {
    TORCH_CHECK_INDEX(
        plan.slot_of_row[r] >= 0, op,
        ": row_map must name every row before expert_offsets[E]=", num_rows, ", got none for row ",
        r);
  }
  return plan;
}

}  // namespace moe_ext::cpu
