// Each expert's slots, best first: what capacity and token rounding keep the first of.
#pragma once

#include <cstring>

#include "common/token_rounding.h"
#include "cuda/kernels/device.cuh"

namespace moe_ext::cuda::kernels {

// A number's bits, turned so that they ascend where the numbers descend; NaN is -infinity.
template <class T>
using Key = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
template <class T>
__device__ Key<T> descending_key(T x) {
  if (x != x) x = T(-INFINITY);
  if (x == T(0)) x = T(0);  // of both signs
  Key<T> bits;
  memcpy(&bits, &x, sizeof(T));
  constexpr Key<T> kSign = Key<T>(1) << (8 * sizeof(T) - 1);
  return bits & kSign ? bits : ~(bits | kSign);
}

// In a workspace, but for rank_slots' own memory.
struct RankedSlots {
  unsigned long long* routed;  // tokens with a choice
  int64_t *limits, *starts;    // [E]: how many an expert takes, and where they lie
  int32_t* offsets;            // [E + 1] into slots
  int32_t *order, *ranked;     // [N] slots, best first; and by expert

  RankedSlots(Arena& arena, int64_t N, int64_t E)
      : routed(arena.take<unsigned long long>(1)),
        limits(arena.take<int64_t>(E)),
        starts(arena.take<int64_t>(E)),
        offsets(arena.take<int32_t>(E + 1)),
        order(arena.take<int32_t>(N)),
        ranked(arena.take<int32_t>(N)) {}
};

__device__ inline bool has_choice(const int64_t* ids, int64_t K, int64_t E) {
  for (int64_t k = 0; k < K; ++k) {
    if (is_valid(ids[k], E)) return true;
  }
  return false;
}

// The most that one expert may take.
__device__ inline int64_t capacity_in(const CapacityArgs& args, const RankedSlots& slots) {
  const auto routed = static_cast<int64_t>(*slots.routed);
  if (!args.factor) return routed;
  return capacity_of(*args.factor, slots.offsets[args.E], routed, args.E, args.least);
}

// Fills offsets, ranked and routed; memory comes from the arena. Without weights: the earlier
// choices first.
void rank_slots(
    Type type, const CapacityArgs& args, const void* weights, const RankedSlots& slots,
    Arena& arena, cudaStream_t stream);

// kept_ids: of each expert its first slots, as many as limits say.
void keep_slots(
    const CapacityArgs& args, const RankedSlots& slots, int64_t* kept_ids, cudaStream_t stream);

}  // namespace moe_ext::cuda::kernels
