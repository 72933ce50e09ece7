// Where every slot (t, k), or pair, goes: a stable counting sort by expert.
#pragma once

#include <ATen/core/Tensor.h>

#include <utility>
#include <vector>

#include "common/score_function.h"
#include "ops/permute.h"

namespace moe_ext::cpu {

struct Plan {
  at::Tensor row_map;         // [T, K] or [P] int32, -1 for a skipped slot
  at::Tensor expert_offsets;  // [E + 1] int32
};

inline void check_id(const char* op, const char* argument, int64_t id) {
  TORCH_CHECK_INDEX(id >= -1, op, ": ", argument, " must be >= -1, got ", id);
}

// topk_ids as numbers, checked: -1 or more.
inline at::Tensor read_ids(const char* op, const at::Tensor& topk_ids) {
  const at::Tensor ids = contiguous_in(topk_ids, at::kLong);
  const int64_t* id = ids.const_data_ptr<int64_t>();
  for (int64_t slot = 0; slot < ids.numel(); ++slot) check_id(op, "topk_ids", id[slot]);
  return ids;
}

// The slots in `order` (or as they come), grouped by expert.
template <class Id>
void plan_kernel(
    const char* op, const char* argument, const Id* ids, const int32_t* order, int64_t num_slots,
    int64_t num_experts, int32_t* row_map, int32_t* expert_offsets) {
  std::vector<int64_t> next(num_experts, 0);
  for (int64_t slot = 0; slot < num_slots; ++slot) {
    check_id(op, argument, ids[slot]);
    if (is_valid(ids[slot], num_experts)) ++next[ids[slot]];
  }
  int64_t offset = 0;
  for (int64_t e = 0; e < num_experts; ++e) {
    expert_offsets[e] = static_cast<int32_t>(offset);
    offset += std::exchange(next[e], offset);
  }
  expert_offsets[num_experts] = static_cast<int32_t>(offset);
  for (int64_t i = 0; i < num_slots; ++i) {
    const int64_t slot = order ? order[i] : i;
    const Id id = ids[slot];
    row_map[slot] = is_valid(id, num_experts) ? static_cast<int32_t>(next[id]++) : -1;
  }
}

// The pairs by token, stable; tokens [P] in [0, T), or -1: last.
inline std::vector<int32_t> order_by_token(const int64_t* tokens, int64_t P, int64_t T) {
  const auto bucket = [T](int64_t token) { return token < 0 ? T : token; };
  std::vector<int64_t> next(T + 1, 0);
  for (int64_t p = 0; p < P; ++p) ++next[bucket(tokens[p])];
  int64_t offset = 0;
  for (int64_t& n : next) offset += std::exchange(n, offset);
  std::vector<int32_t> order(P);
  for (int64_t p = 0; p < P; ++p) order[next[bucket(tokens[p])]++] = static_cast<int32_t>(p);
  return order;
}

// The plan of topk_ids [T, K].
inline Plan make_plan(const char* op, const at::Tensor& topk_ids_, int64_t num_experts) {
  check_count(op, "topk_ids", "slots", topk_ids_.numel());
  const at::Tensor topk_ids = topk_ids_.contiguous();
  const auto [row_map, expert_offsets] = empty_plan(topk_ids, num_experts);
  const Plan plan{row_map, expert_offsets};
  const auto run = [&](const auto* ids) {
    plan_kernel(
        op, "topk_ids", ids, nullptr, topk_ids.numel(), num_experts,
        plan.row_map.mutable_data_ptr<int32_t>(), plan.expert_offsets.mutable_data_ptr<int32_t>());
  };
  if (topk_ids.scalar_type() == at::kLong) {
    run(topk_ids.const_data_ptr<int64_t>());
  } else {
    run(topk_ids.const_data_ptr<int32_t>());
  }
  return plan;
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
  const std::vector<int32_t> order = order_by_token(token, experts.numel(), T);
  const auto [row_map, expert_offsets] = empty_plan(pair_experts, num_experts);
  plan_kernel(
      op, "pair_experts", used.data(), order.data(), experts.numel(), num_experts,
      row_map.mutable_data_ptr<int32_t>(), expert_offsets.mutable_data_ptr<int32_t>());
  return {row_map, expert_offsets};
}

// expert_offsets as numbers, checked: ascending from 0, the last at most num_rows.
inline std::vector<int64_t> read_offsets(
    const char* op, const at::Tensor& expert_offsets_, int64_t num_rows) {
  check_count(op, "rows", "rows", num_rows);
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

// take(slot, row) for every slot that has a row says whether it is the row's first; row_map
// checked: -1 or a row, no row twice.
template <class Fn>
void for_slots(const char* op, const at::Tensor& row_map_, int64_t num_rows, const Fn& take) {
  check_count(op, "row_map", "slots", row_map_.numel());
  check_count(op, "row_map", "rows", row_map_.size(0));
  const at::Tensor row_map = row_map_.contiguous();
  const int32_t* rows = row_map.const_data_ptr<int32_t>();
  for (int64_t slot = 0; slot < row_map.numel(); ++slot) {
    const int32_t row = rows[slot];
    if (row == -1) continue;
    TORCH_CHECK_INDEX(
        row >= 0 && row < num_rows, op, ": row_map must be -1 or in [0, N=", num_rows, "), got ",
        row);
    TORCH_CHECK_INDEX(
        take(static_cast<int32_t>(slot), row), op,
        ": row_map must name a row once at most, got row ", row, " twice");
  }
}

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

}  // namespace moe_ext::cpu
