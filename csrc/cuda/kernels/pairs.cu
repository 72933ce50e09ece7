#include "cuda/kernels/ranked_slots.cuh"

namespace moe_ext::cuda::kernels {
namespace {

// One block. starts holds the counts of choices until it gets its own.
__global__ void round_limits_kernel(RoundArgs args, RankedSlots slots) {
  const int64_t E = args.capacity.E;
  const int64_t most = capacity_in(args.capacity, slots);
  for (int64_t e = threadIdx.x; e < E; e += kThreads) {
    slots.starts[e] = slots.offsets[e + 1] - slots.offsets[e];
  }
  __syncthreads();
  for (int64_t e = threadIdx.x; e < E; e += kThreads) {
    slots.limits[e] =
        round_count(slots.starts, e, E, args.tile_size, most, args.rounding, args.noise);
  }
  __syncthreads();
  if (threadIdx.x >= kWarp) return;
  int64_t before = 0;
  for (int64_t first = 0; first < E; first += kWarp) {
    const int64_t e = first + lane();
    const int64_t own = e < E ? slots.limits[e] : 0;
    const int64_t up_to = before + warp_scan(own);
    if (e < E) slots.starts[e] = up_to - own;
    before = __shfl_sync(kAllLanes, up_to, kWarp - 1);
  }
}

// Bits of a key that find_cut looks at in one pass over the tokens: as many digits as a block has
// threads to clear and to add them up, and 4 passes of fp32 keys. [rounding, Qwen3-30B-A3B]
constexpr int kDigitBits = 8, kDigits = 1 << kDigitBits;

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
  __shared__ unsigned counts[kDigits];
  __shared__ Owner digit;
  Cut<T> cut{0, count};
  if (count == 0) return cut;
  Key<T> known = 0;  // the bits of the key that are known
  for (int shift = 8 * sizeof(T) - kDigitBits; shift >= 0; shift -= kDigitBits) {
    for (int i = threadIdx.x; i < kDigits; i += kThreads) counts[i] = 0;
    __syncthreads();
    for (int64_t t = threadIdx.x; t < num_tokens; t += kThreads) {
      Key<T> key;
      if (key_of(t, &key) && (key & known) == cut.key) {
        atomicAdd(&counts[key >> shift & (kDigits - 1)], 1u);
      }
    }
    __syncthreads();
    if (threadIdx.x < kWarp) {
      const Owner found =
          find_owner(kDigits, cut.ties - 1, [&](int64_t i) { return int64_t(counts[i]); });
      if (lane() == 0) digit = found;
    }
    __syncthreads();
    cut.key |= static_cast<Key<T>>(digit.i) << shift;
    cut.ties -= digit.before;
    known |= Key<T>(kDigits - 1) << shift;
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
    int64_t E, RankedSlots slots, MutablePairList pairs) {
  const int64_t e = blockIdx.x;
  const int64_t missing = slots.limits[e] - (slots.offsets[e + 1] - slots.offsets[e]);
  write_pairs<T>(
      num_tokens, e, slots.starts[e], missing > 0 ? missing : 0, pairs,
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

void clear_pairs(const MutablePairList& pairs, cudaStream_t stream) {
  for (int64_t* list : {pairs.tokens, pairs.experts, pairs.slots}) {
    if (list) cudaMemsetAsync(list, 0xff, pairs.size * sizeof(int64_t), stream);
  }
}

}  // namespace

void round_tokens(
    Type type, const RoundArgs& args, const void* probs, const void* weights,
    const MutablePairList& pairs, int64_t* kept_ids, void* workspace, cudaStream_t stream) {
  const CapacityArgs& capacity = args.capacity;
  const int64_t N = capacity.T * capacity.K;
  Arena arena(workspace);
  const RankedSlots slots(arena, N, capacity.E);
  clear_pairs(pairs, stream);
  rank_slots(type, capacity, weights, slots, arena, stream);
  launch(round_limits_kernel, 1, kThreads, 0, stream, args, slots);
  keep_slots(capacity, slots, kept_ids, stream);
  dispatch_compute(type, [&](auto number) {
    using T = decltype(number);
    launch(
        round_tokens_kernel<T>, capacity.E, kThreads, 0, stream, static_cast<const T*>(probs),
        capacity.ids, static_cast<const int64_t*>(kept_ids), capacity.T, capacity.K, capacity.E,
        slots, pairs);
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

}  // namespace moe_ext::cuda::kernels
