// Where every slot (t, k), or pair, goes: a stable counting sort by expert.
//
// Plain C++, the same for every instruction set. Callers check what comes as an argument:
// find_bad_id, for_slots.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "common/score_function.h"

namespace moe_ext::cpu::kernels {

// The place of the first id below -1; n if there is none.
template <class Id>
int64_t find_bad_id(const Id* ids, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    if (ids[i] < -1) return i;
  }
  return n;
}

// The slots in `order` (or null: as they come), grouped by expert; the skipped ones have row -1.
//   ids [N]   row_map [N]   expert_offsets [E + 1]   slot_of_row [N] or null: the rows before
//   expert_offsets[E] are written
template <class Id>
void make_plan(
    const Id* ids, const int32_t* order, int64_t N, int64_t E, int32_t* row_map,
    int32_t* expert_offsets, int32_t* slot_of_row) {
  std::vector<int64_t> next(E, 0);
  for (int64_t slot = 0; slot < N; ++slot) {
    if (is_valid(ids[slot], E)) ++next[ids[slot]];
  }
  int64_t offset = 0;
  for (int64_t e = 0; e < E; ++e) {
    expert_offsets[e] = static_cast<int32_t>(offset);
    offset += std::exchange(next[e], offset);
  }
  expert_offsets[E] = static_cast<int32_t>(offset);
  for (int64_t i = 0; i < N; ++i) {
    const int64_t slot = order ? order[i] : i;
    const Id id = ids[slot];
    row_map[slot] = is_valid(id, E) ? static_cast<int32_t>(next[id]++) : -1;
    if (slot_of_row && row_map[slot] >= 0) slot_of_row[row_map[slot]] = static_cast<int32_t>(slot);
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

// What is wrong with a row_map, and the row that is.
enum class RowMapFault { kNone, kOutside, kTwice };
struct RowMapCheck {
  RowMapFault fault;
  int32_t row;
};

// take(slot, row), called for every slot with a row, returns whether no slot had that row before.
// Stops at the first slot whose row is neither -1 nor in [0, num_rows), or was named before.
template <class Fn>
RowMapCheck for_slots(const int32_t* row_map, int64_t num_slots, int64_t num_rows, const Fn& take) {
  for (int64_t slot = 0; slot < num_slots; ++slot) {
    const int32_t row = row_map[slot];
    if (row == -1) continue;
    if (row < 0 || row >= num_rows) return {RowMapFault::kOutside, row};
    if (!take(static_cast<int32_t>(slot), row)) return {RowMapFault::kTwice, row};
  }
  return {RowMapFault::kNone, -1};
}

// permuted[row_map[t, k]] = tokens[t] for the tokens [begin, end), rows of row_bytes.
inline void gather_rows(
    const char* tokens, const int32_t* row_map, int64_t K, int64_t row_bytes, int64_t begin,
    int64_t end, char* permuted) {
  for (int64_t t = begin; t < end; ++t) {
    for (int64_t k = 0; k < K; ++k) {
      const int64_t row = row_map[t * K + k];
      if (row >= 0) __builtin_memcpy(permuted + row * row_bytes, tokens + t * row_bytes, row_bytes);
    }
  }
}

}  // namespace moe_ext::cpu::kernels
