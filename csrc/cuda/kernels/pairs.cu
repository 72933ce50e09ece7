#ifndef MOE_EXT_CUDA_EMULATION
#include <cub/device/device_radix_sort.cuh>
#endif

#include <cstring>

#include "common/token_rounding.h"
#include "cuda/kernels/device.cuh"

namespace moe_ext::cuda {
namespace {

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

struct PairWorkspace {
  unsigned long long* routed;  // tokens with a choice
  int64_t *limits, *starts;    // [E]: how many an expert takes, and where they lie
  int32_t* offsets;            // [E + 1] into slots
  int32_t *order, *ranked;     // [N] slots, best first; and by expert

  PairWorkspace(Arena& arena, int64_t N, int64_t E)
      : routed(arena.take<unsigned long long>(1)),
        limits(arena.take<int64_t>(E)),
        starts(arena.take<int64_t>(E)),
        offsets(arena.take<int32_t>(E + 1)),
        order(arena.take<int32_t>(N)),
        ranked(arena.take<int32_t>(N)) {}
};

template <class T>
struct SortWorkspace {
  Key<T>*keys, *sorted_keys;
  int32_t* slots;
  char* memory;
  size_t bytes = 0;

  SortWorkspace(Arena& arena, int64_t N)
      : keys(arena.take<Key<T>>(N)),
        sorted_keys(arena.take<Key<T>>(N)),
        slots(arena.take<int32_t>(N)) {
    sort(nullptr, N, slots, nullptr);
    memory = arena.take<char>(bytes);
  }

  void sort(void* workspace, int64_t N, int32_t* order, cudaStream_t stream) {
    cub::DeviceRadixSort::SortPairs(
        workspace, bytes, static_cast<const Key<T>*>(keys), sorted_keys,
        static_cast<const int32_t*>(slots), order, static_cast<int>(N), 0, 8 * int(sizeof(T)),
        stream);
  }
};

template <class T>
__global__ void weight_keys_kernel(const T* weights, int64_t N, Key<T>* keys, int32_t* slots) {
  const int64_t slot = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (slot >= N) return;
  keys[slot] = descending_key(weights[slot]);
  slots[slot] = static_cast<int32_t>(slot);
}

// All first choices before all second ones.
__global__ void choice_order_kernel(int64_t num_tokens, int64_t K, int32_t* order) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < num_tokens * K) order[i] = static_cast<int32_t>(i % num_tokens * K + i / num_tokens);
}

__device__ bool has_choice(const int64_t* ids, int64_t K, int64_t E) {
  for (int64_t k = 0; k < K; ++k) {
    if (is_valid(ids[k], E)) return true;
  }
  return false;
}

__global__ void count_routed_kernel(
    const int64_t* ids, int64_t num_tokens, int64_t K, int64_t E, unsigned long long* routed) {
  const int64_t t = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (t < num_tokens && has_choice(ids + t * K, K, E)) atomicAdd(routed, 1ull);
}

__device__ int64_t capacity_in(const CapacityArgs& args, const PairWorkspace& work) {
  const auto routed = static_cast<int64_t>(*work.routed);
  if (!args.factor) return routed;
  return capacity_of(*args.factor, work.offsets[args.E], routed, args.E, args.least);
}

__global__ void capacity_limits_kernel(CapacityArgs args, PairWorkspace work) {
  const int64_t e = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (e < args.E) work.limits[e] = capacity_in(args, work);
}

// One block. starts holds the counts of choices until it gets its own.
__global__ void round_limits_kernel(RoundArgs args, PairWorkspace work) {
  const int64_t E = args.capacity.E;
  const int64_t most = capacity_in(args.capacity, work);
  for (int64_t e = threadIdx.x; e < E; e += kThreads) {
    work.starts[e] = work.offsets[e + 1] - work.offsets[e];
  }
  __syncthreads();
  for (int64_t e = threadIdx.x; e < E; e += kThreads) {
    work.limits[e] =
        round_count(work.starts, e, E, args.tile_size, most, args.rounding, args.noise);
  }
  __syncthreads();
  if (threadIdx.x >= kWarp) return;
  int64_t before = 0;
  for (int64_t first = 0; first < E; first += kWarp) {
    const int64_t e = first + lane();
    const int64_t own = e < E ? work.limits[e] : 0;
    const int64_t up_to = before + warp_scan(own);
    if (e < E) work.starts[e] = up_to - own;
    before = __shfl_sync(kAllLanes, up_to, kWarp - 1);
  }
}

__global__ void keep_kernel(PairWorkspace work, int64_t N, int64_t E, int64_t* kept_ids) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= N) return;
  const int64_t e = expert_of_row(work.offsets, E, i);
  const bool is_kept = e >= 0 && i - work.offsets[e] < work.limits[e];
  kept_ids[work.ranked[i]] = is_kept ? e : -1;
}

// Among the candidates: those with a key below `key`, and the `ties` earliest with that key.
template <class T>
struct Cut {
  Key<T> key;
  int64_t ties;
};

// The cut that leaves `count` of at least as many candidates; key_of(t, &key) says whether t is
// one. A block computes it together: digit by digit, from how many candidates have each.
template <class T, class Fn>
__device__ Cut<T> find_cut(int64_t num_tokens, int64_t count, const Fn& key_of) {
  __shared__ unsigned counts[256];
  __shared__ Owner digit;
  Cut<T> cut{0, count};
  if (count == 0) return cut;
  Key<T> known = 0;  // the bits of the key that are known
  for (int shift = 8 * sizeof(T) - 8; shift >= 0; shift -= 8) {
    for (int i = threadIdx.x; i < 256; i += kThreads) counts[i] = 0;
    __syncthreads();
    for (int64_t t = threadIdx.x; t < num_tokens; t += kThreads) {
      Key<T> key;
      if (key_of(t, &key) && (key & known) == cut.key) atomicAdd(&counts[key >> shift & 255], 1u);
    }
    __syncthreads();
    if (threadIdx.x < kWarp) {
      const Owner found =
          find_owner(256, cut.ties - 1, [&](int64_t i) { return int64_t(counts[i]); });
      if (lane() == 0) digit = found;
    }
    __syncthreads();
    cut.key |= static_cast<Key<T>>(digit.i) << shift;
    cut.ties -= digit.before;
    known |= Key<T>(255) << shift;
  }
  return cut;
}

// How many threads before this one say yes; `total`: of all. A block computes it together.
__device__ int64_t count_before(bool yes, int64_t* total) {
  __shared__ int of_warp[kThreads / kWarp];
  const unsigned votes = __ballot_sync(kAllLanes, yes);
  __syncthreads();  // the counts of the call before have been read
  if (lane() == 0) of_warp[threadIdx.x / kWarp] = __popc(votes);
  __syncthreads();
  int before = __popc(votes & ((1u << lane()) - 1)), all = 0;
  for (int w = 0; w < kThreads / kWarp; ++w) {
    if (w < static_cast<int>(threadIdx.x) / kWarp) before += of_warp[w];
    all += of_warp[w];
  }
  *total = all;
  return before;
}

// Writes the pairs of expert e, by token, from `start` on: the `count` best candidates, and those
// that have a slot; slot_of(t) is -1 for the others. One block.
template <class T, class KeyFn, class SlotFn>
__device__ void write_pairs(
    int64_t num_tokens, int64_t e, int64_t start, int64_t count, const MutablePairList& pairs,
    const KeyFn& key_of, const SlotFn& slot_of) {
  const Cut<T> cut = find_cut<T>(num_tokens, count, key_of);
  int64_t ties = 0, written = 0;
  for (int64_t first = 0; first < num_tokens; first += kThreads) {
    const int64_t t = first + threadIdx.x;
    Key<T> key = 0;
    const bool is_candidate = count > 0 && t < num_tokens && key_of(t, &key);
    const bool is_tie = is_candidate && key == cut.key;
    int64_t total;
    const bool is_early = ties + count_before(is_tie, &total) < cut.ties;
    ties += total;
    const int64_t slot = t < num_tokens ? slot_of(t) : -1;
    const bool is_pair = slot >= 0 || (is_candidate && key < cut.key) || (is_tie && is_early);
    const int64_t at = start + written + count_before(is_pair, &total);
    written += total;
    if (!is_pair || at >= pairs.size) continue;
    pairs.tokens[at] = t;
    pairs.experts[at] = e;
    if (pairs.slots) pairs.slots[at] = slot;
  }
}

template <class T>
__global__ void round_tokens_kernel(
    const T* probs, const int64_t* ids, const int64_t* kept_ids, int64_t num_tokens, int64_t K,
    int64_t E, PairWorkspace work, MutablePairList pairs) {
  const int64_t e = blockIdx.x;
  const int64_t missing = work.limits[e] - (work.offsets[e + 1] - work.offsets[e]);
  write_pairs<T>(
      num_tokens, e, work.starts[e], missing > 0 ? missing : 0, pairs,
      [&](int64_t t, Key<T>* key) {
        *key = descending_key(probs[t * E + e]);
        for (int64_t k = 0; k < K; ++k) {
          if (ids[t * K + k] == e) return false;
        }
        return has_choice(ids + t * K, K, E);
      },
      [&](int64_t t) {
        for (int64_t k = 0; k < K; ++k) {
          if (kept_ids[t * K + k] == e) return t * K + k;
        }
        return int64_t(-1);
      });
}

template <class T>
__global__ void expert_choice_kernel(
    const T* probs, const bool* mask, const unsigned long long* unmasked, int64_t num_tokens,
    int64_t E, int64_t top_k, MutablePairList pairs) {
  const int64_t e = blockIdx.x;
  const auto tokens = static_cast<int64_t>(*unmasked);
  const int64_t share = ceil_div(tokens * top_k, E);
  const int64_t count = share < tokens ? share : tokens;
  write_pairs<T>(
      num_tokens, e, e * count, count, pairs,
      [&](int64_t t, Key<T>* key) {
        *key = descending_key(probs[t * E + e]);
        return !mask || mask[t];
      },
      [](int64_t) { return int64_t(-1); });
}

template <class T>
__global__ void pair_weights_kernel(
    const T* topk_weights, const T* probs, PairList pairs, int64_t E, T scale, T* out) {
  const int64_t p = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (p >= pairs.size) return;
  const int64_t token = pairs.tokens[p], slot = pairs.slots ? pairs.slots[p] : -1;
  out[p] = token < 0   ? T(0)
           : slot >= 0 ? topk_weights[slot]
                       : scale * probs[token * E + pairs.experts[p]];
}

// No two pairs have the same slot, nor the same token and expert.
template <class T>
__global__ void pair_weights_backward_kernel(
    const T* grad, PairList pairs, int64_t E, T scale, T* grad_weights, T* grad_probs) {
  const int64_t p = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (p >= pairs.size || pairs.tokens[p] < 0) return;
  const int64_t slot = pairs.slots ? pairs.slots[p] : -1;
  if (slot >= 0) {
    if (grad_weights) grad_weights[slot] = grad[p];
  } else if (grad_probs) {
    grad_probs[pairs.tokens[p] * E + pairs.experts[p]] = scale * grad[p];
  }
}

// Fills offsets, ranked and routed. Without weights: the earlier choices first.
template <class T>
void rank_slots(
    const CapacityArgs& args, const T* weights, const PairWorkspace& work, SortWorkspace<T>& sort,
    void* plan, cudaStream_t stream) {
  const int64_t N = args.T * args.K, blocks = ceil_div(N, kThreads);
  if (N > 0 && weights) {
    launch(weight_keys_kernel<T>, blocks, kThreads, 0, stream, weights, N, sort.keys, sort.slots);
    sort.sort(sort.memory, N, work.order, stream);
  } else if (N > 0) {
    launch(choice_order_kernel, blocks, kThreads, 0, stream, args.T, args.K, work.order);
  }
  make_plan(
      IdType::kI64, args.ids, work.order, N, args.E, nullptr, work.offsets, work.ranked, plan,
      stream);
  cudaMemsetAsync(work.routed, 0, sizeof(*work.routed), stream);
  if (args.T == 0) return;
  launch(
      count_routed_kernel, ceil_div(args.T, kThreads), kThreads, 0, stream, args.ids, args.T,
      args.K, args.E, work.routed);
}

void keep_slots(
    const CapacityArgs& args, const PairWorkspace& work, int64_t* kept_ids, cudaStream_t stream) {
  const int64_t N = args.T * args.K;
  if (N == 0) return;
  launch(keep_kernel, ceil_div(N, kThreads), kThreads, 0, stream, work, N, args.E, kept_ids);
}

void clear_pairs(const MutablePairList& pairs, cudaStream_t stream) {
  for (int64_t* list : {pairs.tokens, pairs.experts, pairs.slots}) {
    if (list) cudaMemsetAsync(list, 0xff, pairs.size * sizeof(int64_t), stream);
  }
}

}  // namespace

size_t capacity_workspace(Type type, const CapacityArgs& args) {
  Arena arena(nullptr);
  const int64_t N = args.T * args.K;
  PairWorkspace(arena, N, args.E);
  dispatch_compute(type, [&](auto number) { SortWorkspace<decltype(number)>(arena, N); });
  return arena.bytes() + plan_workspace(N, args.E);
}

void apply_capacity(
    Type type, const CapacityArgs& args, const void* weights, int64_t* kept_ids, void* workspace,
    cudaStream_t stream) {
  Arena arena(workspace);
  const PairWorkspace work(arena, args.T * args.K, args.E);
  dispatch_compute(type, [&](auto number) {
    using T = decltype(number);
    SortWorkspace<T> sort(arena, args.T * args.K);
    rank_slots(args, static_cast<const T*>(weights), work, sort, arena.take<char>(0), stream);
  });
  launch(capacity_limits_kernel, ceil_div(args.E, kThreads), kThreads, 0, stream, args, work);
  keep_slots(args, work, kept_ids, stream);
}

void round_tokens(
    Type type, const RoundArgs& args, const void* probs, const void* weights,
    const MutablePairList& pairs, int64_t* kept_ids, void* workspace, cudaStream_t stream) {
  const CapacityArgs& capacity = args.capacity;
  const int64_t N = capacity.T * capacity.K;
  Arena arena(workspace);
  const PairWorkspace work(arena, N, capacity.E);
  clear_pairs(pairs, stream);
  dispatch_compute(type, [&](auto number) {
    using T = decltype(number);
    SortWorkspace<T> sort(arena, N);
    rank_slots(capacity, static_cast<const T*>(weights), work, sort, arena.take<char>(0), stream);
    launch(round_limits_kernel, 1, kThreads, 0, stream, args, work);
    keep_slots(capacity, work, kept_ids, stream);
    launch(
        round_tokens_kernel<T>, capacity.E, kThreads, 0, stream, static_cast<const T*>(probs),
        capacity.ids, static_cast<const int64_t*>(kept_ids), capacity.T, capacity.K, capacity.E,
        work, pairs);
  });
}

size_t expert_choice_workspace() { return sizeof(unsigned long long); }

void expert_choice(
    Type type, const void* probs, const bool* token_mask, int64_t T_, int64_t E, int64_t top_k,
    const MutablePairList& pairs, void* workspace, cudaStream_t stream) {
  clear_pairs(pairs, stream);
  if (T_ == 0) return;
  auto* unmasked = static_cast<unsigned long long*>(workspace);
  count_tokens(token_mask, T_, 1, unmasked, stream);
  dispatch_compute(type, [&](auto number) {
    using T = decltype(number);
    launch(
        expert_choice_kernel<T>, E, kThreads, 0, stream, static_cast<const T*>(probs), token_mask,
        static_cast<const unsigned long long*>(unmasked), T_, E, top_k, pairs);
  });
}

void pair_weights(
    Type type, const void* topk_weights, const void* probs, const PairList& pairs, int64_t E,
    double scale, void* out, cudaStream_t stream) {
  if (pairs.size == 0) return;
  dispatch_compute(type, [&](auto number) {
    using T = decltype(number);
    launch(
        pair_weights_kernel<T>, ceil_div(pairs.size, kThreads), kThreads, 0, stream,
        static_cast<const T*>(topk_weights), static_cast<const T*>(probs), pairs, E,
        static_cast<T>(scale), static_cast<T*>(out));
  });
}

void pair_weights_backward(
    Type type, const void* grad, const PairList& pairs, int64_t E, double scale, void* grad_weights,
    void* grad_probs, cudaStream_t stream) {
  if (pairs.size == 0) return;
  dispatch_compute(type, [&](auto number) {
    using T = decltype(number);
    launch(
        pair_weights_backward_kernel<T>, ceil_div(pairs.size, kThreads), kThreads, 0, stream,
        static_cast<const T*>(grad), pairs, E, static_cast<T>(scale), static_cast<T*>(grad_weights),
        static_cast<T*>(grad_probs));
  });
}

}  // namespace moe_ext::cuda
